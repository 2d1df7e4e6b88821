"""The embedded set with its real daemons."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.embedded.child import ChildEvent
from farpage.embedded.set import DaemonFailed, EmbeddedSet, SetSettings, StateInUse, ViosPlacement
from farpage.errors import FarpageError

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEADLINE_SECONDS = 60.0


class Heard:
    """The events of a set, and a way to wait for one."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._more = asyncio.Event()

    def __call__(self, event: ChildEvent) -> None:
        self.messages.append(f"{event.child}: {event.message}")
        self._more.set()

    async def until(self, child: str, words: str, count: int = 1) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while sum(text.startswith(child) and words in text for text in self.messages) < count:
                self._more.clear()
                await self._more.wait()


@pytest.fixture
def state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fpset-", dir="/tmp") as folder:
        yield Path(folder) / "s"


def settings(state: Path, vios_count: int = 1) -> SetSettings:
    return SetSettings(state_dir=state, vios_count=vios_count, workers=1)


async def until_answers(embedded: EmbeddedSet, vios: str, pid_before: int) -> int:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            try:
                pid = (await embedded.vioses[vios].health(timeout_seconds=5)).pid
            except FarpageError:
                pid = pid_before
            if pid != pid_before:
                return pid
            await asyncio.sleep(0.05)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[tuple[EmbeddedSet, Heard]]:
    """A set whose second VIOS is elsewhere; its tests leave every daemon at work."""
    elsewhere = ViosPlacement(data=("tcp:127.0.0.1:0",), launcher=("env", "FARPAGE_TEST_LAUNCHED=1"))
    heard = Heard()
    with tempfile.TemporaryDirectory(prefix="fpset-", dir="/tmp") as folder:
        settings = SetSettings(state_dir=Path(folder) / "s", workers=1, placements={"vios2": elsewhere})
        embedded = EmbeddedSet(settings, heard)
        await embedded.start()
        try:
            yield embedded, heard
        finally:
            await embedded.stop()
    assert (embedded.vios_pid("vios1"), embedded.hypervisor_pid) == (None, None)


async def test_a_vios_that_dies_is_started_again_with_its_devices(
    running: tuple[EmbeddedSet, Heard],
) -> None:
    embedded, heard = running
    devices = await embedded.vioses["vios1"].devices()
    assert [device.spec for device in devices] == [f"dir:{embedded.layout.common_device}"]
    before = embedded.vios_pid("vios1")
    assert before is not None
    heard.messages.clear()
    embedded.kill_vios("vios1", signal.SIGKILL)
    await heard.until("vios1", "killed by SIGKILL")
    await heard.until("vios1", "started")
    assert await until_answers(embedded, "vios1", before) == embedded.vios_pid("vios1")
    again = await embedded.vioses["vios1"].devices()
    assert [device.id for device in again] == [device.id for device in devices]


async def test_a_vios_that_is_not_supervised_stays_dead_until_it_is_started(
    running: tuple[EmbeddedSet, Heard],
) -> None:
    embedded, heard = running
    heard.messages.clear()
    embedded.supervise_vios("vios1", False)
    embedded.kill_vios("vios1", signal.SIGKILL)
    await embedded.vios_exited("vios1")
    await heard.until("vios1", "killed by SIGKILL")
    assert embedded.vios_pid("vios1") is None
    await embedded.start_vios("vios1")
    assert (await embedded.vioses["vios1"].health()).pid == embedded.vios_pid("vios1")
    assert sum("started" in text for text in heard.messages if text.startswith("vios1")) == 1


async def test_a_hypervisor_that_is_not_supervised_stays_dead_until_it_is_started(
    running: tuple[EmbeddedSet, Heard],
) -> None:
    embedded, heard = running
    embedded.supervise_hypervisor(False)
    embedded.kill_hypervisor(signal.SIGKILL)
    await embedded.hypervisor_exited()
    await heard.until("hypervisor", "killed by SIGKILL")
    assert embedded.hypervisor_pid is None
    await embedded.start_hypervisor()
    assert (await embedded.hypervisor.info()).pid == embedded.hypervisor_pid


async def test_a_vios_may_have_addresses_and_a_launcher_of_its_own(
    running: tuple[EmbeddedSet, Heard],
) -> None:
    embedded, _ = running
    (near,) = (await embedded.vioses["vios1"].health()).data
    (far,) = (await embedded.vioses["vios2"].health()).data
    assert near == f"unix:{embedded.layout.vios_dir('vios1') / 'data.sock'}"
    assert far.startswith("tcp:127.0.0.1:")
    environments = [
        Path(f"/proc/{embedded.vios_pid(vios)}/environ").read_bytes()  # noqa: ASYNC240
        for vios in embedded.vioses
    ]
    assert [b"FARPAGE_TEST_LAUNCHED=1" in environment for environment in environments] == [False, True]


async def test_a_state_folder_is_used_once_at_a_time_and_again_after_a_stop_with_a_hung_vios(
    state: Path,
) -> None:
    heard = Heard()
    first = EmbeddedSet(settings(state, vios_count=2), heard)
    await first.start()
    with pytest.raises(StateInUse):
        await EmbeddedSet(settings(state, vios_count=2)).start()
    ids = [device.id for device in await first.vioses["vios1"].devices()]
    first.kill_vios("vios2", signal.SIGSTOP)
    await first.stop()
    assert [text for text in heard.messages if "exited with status 0" in text] != []
    assert first.vios_pid("vios2") is None
    second = EmbeddedSet(settings(state, vios_count=2))
    await second.start()
    try:
        assert [device.id for device in await second.vioses["vios1"].devices()] == ids
    finally:
        await second.stop()


async def test_a_daemon_that_cannot_start_is_named_with_its_last_words(state: Path) -> None:
    embedded = EmbeddedSet(settings(state))
    (state / "vios" / "vios1" / "vios.db").mkdir(parents=True)
    with pytest.raises(DaemonFailed) as caught:
        await embedded.start()
    assert caught.value.daemon == "vios1"
    assert caught.value.last_words
    assert caught.value.log in str(caught.value)
    assert embedded.vios_pid("vios1") is None
