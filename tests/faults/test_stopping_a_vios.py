"""A VIOS is stopped on purpose under load: its clients move off it first, and nothing is lost."""

from __future__ import annotations

import json
import signal

import pytest

from farpage.api.remote import RemoteError
from tests.support.paged_set import PagedSet

pytestmark = pytest.mark.asyncio(loop_scope="module")


def last_words(paged: PagedSet, vios: str) -> dict[str, object]:
    """Return what a VIOS logged when it began to end."""
    lines = (paged.embedded.layout.vios_dir(vios) / "log").read_text().splitlines()
    found = [json.loads(line) for line in lines if '"stopping"' in line]
    assert found, lines
    return dict(found[-1])


async def test_clients_move_to_their_other_path_before_their_vios_stops(paged: PagedSet) -> None:
    await paged.write_all()
    active = await paged.active()
    other = next(vios for vios in paged.embedded.vioses if vios != active)
    await paged.until_state(other, "standby")
    pid = paged.embedded.vios_pid(active)
    paged.client.send(f"write 0 {paged.pages}")
    answer = await paged.embedded.hypervisor.stop_vios(active)
    assert (answer.vios, answer.pid, answer.moved, answer.waiting) == (active, pid, ("client",), ())
    assert await paged.client.answer() == "done"
    await paged.embedded.vios_exited(active)
    assert last_words(paged, active)["open_exports"] == 0
    info = await paged.info()
    assert {path.vios: (path.state, path.reason) for path in info.paths} == {
        other: ("active", ""),
        active: ("failed", "stopped on request"),
    }
    assert [(one.from_vios, one.to_vios, one.quarantined_pages) for one in info.failovers] == [
        (active, other, 0)
    ]
    assert "path_failed" not in [alarm.kind for alarm in await paged.embedded.hypervisor.alarms()]
    await paged.verify_all()
    assert paged.embedded.vios_pid(active) is None
    await paged.embedded.start_vios(active)
    await paged.until_state(active, "standby")
    await paged.verify_all()


async def test_a_vios_that_is_a_clients_only_path_is_not_stopped_without_force(paged: PagedSet) -> None:
    await paged.write_all()
    active = await paged.active()
    other = next(vios for vios in paged.embedded.vioses if vios != active)
    paged.signal(other, signal.SIGKILL)
    await paged.until_state(other, "failed")
    with pytest.raises(RemoteError, match="paged: client") as caught:
        await paged.embedded.hypervisor.stop_vios(active)
    assert caught.value.code == "vios_needed"
    assert "--force" in caught.value.advice
    await paged.verify_all()
    answer = await paged.embedded.hypervisor.stop_vios(active, force=True)
    assert (answer.moved, answer.waiting) == ((), ("client",))
    # What it reads may come directly from the device; what it writes has to be paged out.
    paged.client.send(f"write 0 {paged.pages}")
    await paged.until(lambda info: info.stalled_faults > 0, "stalled")
    await paged.embedded.start_vios(active)
    assert await paged.client.answer() == "done"
    await paged.until_state(active, "active")


async def test_one_vios_after_the_other_is_stopped_and_started_under_load(paged: PagedSet) -> None:
    for _ in range(2):
        active = await paged.active()
        other = next(vios for vios in paged.embedded.vioses if vios != active)
        await paged.until_state(other, "standby")
        paged.client.send(f"write 0 {paged.pages}")
        await paged.embedded.hypervisor.stop_vios(active)
        assert await paged.client.answer() == "done"
        await paged.embedded.vios_exited(active)
        await paged.embedded.start_vios(active)
        await paged.verify_all()
    assert [one.quarantined_pages for one in (await paged.info()).failovers] == [0, 0]


async def test_stopping_what_is_not_there_is_refused(paged: PagedSet) -> None:
    with pytest.raises(RemoteError) as unknown:
        await paged.embedded.hypervisor.stop_vios("ghost")
    assert unknown.value.code == "no_such_vios"
    active = await paged.active()
    standby = next(vios for vios in paged.embedded.vioses if vios != active)
    paged.signal(standby, signal.SIGKILL)
    await paged.embedded.vios_exited(standby)
    with pytest.raises(RemoteError) as away:
        await paged.embedded.hypervisor.stop_vios(standby)
    assert away.value.code == "vios_away"
