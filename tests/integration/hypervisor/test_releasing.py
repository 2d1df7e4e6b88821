"""A client that one hypervisor releases and another one adopts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from farpage.api.remote import RemoteError
from farpage.embedded.control import HypervisorControl
from farpage.embedded.set import EmbeddedSet
from farpage.hypervisor.model import ClientAdopt, ClientInfo, ClientRelease
from tests.support.paged_set import RegionProcess, running_set
from tests.support.second_hypervisor import Other, second_hypervisor

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = 1024
PAGE_BYTES = 4096
LIMIT_BYTES = 1 << 20
FORCE = ClientRelease(force=True)


@dataclass
class Two:
    """Two hypervisors on the same two VIOSes."""

    embedded: EmbeddedSet
    other: Other

    @property
    def first(self) -> HypervisorControl:
        return self.embedded.hypervisor

    @property
    def second(self) -> HypervisorControl:
        return self.other.control

    async def region(self, name: str, version: int = 0) -> RegionProcess:
        """Start a process with a region at the first hypervisor."""
        return await RegionProcess.start(self.embedded.layout.root, PAGES, LIMIT_BYTES, name, version)

    async def second_region(self, name: str, version: int = 0) -> RegionProcess:
        """Start one at the second."""
        return await RegionProcess.start(self.other.state, PAGES, LIMIT_BYTES, name, version)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two() -> AsyncIterator[Two]:
    async with running_set(workers=1) as embedded, second_hypervisor(embedded) as other:
        yield Two(embedded, other)


async def refused(request: object) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await request  # type: ignore[misc]
    return caught.value


def released_by(info: ClientInfo) -> tuple[str, str] | None:
    return (info.released.hypervisor, info.released.adopter) if info.released else None


async def test_a_region_goes_to_another_hypervisor_without_one_page_read_back(two: Two) -> None:
    first = await two.region("moving")
    await first.do(f"write 0 {PAGES}")
    before = (await two.first.client("moving")).counters.page_in_pages
    released = await two.first.release("moving", FORCE)
    assert (released.attachment, released_by(released)) == ("none", ("hypervisor", ""))
    adopted = await two.second.adopt("moving", ClientAdopt())
    assert released_by(adopted) == ("hypervisor", "other")
    assert adopted.epoch > released.epoch
    second = await two.second_region("moving", version=1)
    try:
        info = await two.second.client("moving")
        assert (info.on_device_bytes, info.resident_bytes, before) == (PAGES * PAGE_BYTES, 0, before)
        assert info.counters.page_in_pages == 0
        assert info.released is None
        assert await second.do(f"verify 0 {PAGES}") == "wrong 0"
        assert await second.do(f"write 0 {PAGES}") == "done"
        assert await second.do(f"verify 0 {PAGES}") == "wrong 0"
        # The first process waits at what it touches, until it lets its region go.
        first.send("verify 0 1")
        assert (await two.second.client("moving")).fenced == ""
    finally:
        await second.do("close")
        await first.stop()
    await two.second.delete_client("moving")
