"""Pausing a guest by QMP, against a stand-in for QEMU at a real socket."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from farpage.hypervisor import guestpause
from farpage.hypervisor.guestpause import GuestPause
from tests.support.qemu_stand_in import QemuStandIn


@dataclass
class Paused:
    """A pause, and what it told."""

    qemu: QemuStandIn
    remembered: list[bool] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    pauses: list[GuestPause] = field(default_factory=list)

    def pause(self, *, paused: bool = False) -> GuestPause:
        pause = GuestPause(
            self.qemu.socket, paused, self.remembered.append, lambda kind, _message: self.alarms.append(kind)
        )
        self.pauses.append(pause)
        return pause

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Paused]:
    monkeypatch.setattr(guestpause, "PAUSE_AFTER_SECONDS", 0.05)
    monkeypatch.setattr(guestpause, "RETRY_SECONDS", 0.02)
    with tempfile.TemporaryDirectory(prefix="fpqmp-", dir="/tmp") as folder:
        async with QemuStandIn(str(Path(folder) / "q")) as qemu:
            rig = Paused(qemu)
            yield rig
            for pause in rig.pauses:
                await pause.close()


async def test_a_guest_is_paused_without_a_path_and_goes_on_with_one(rig: Paused) -> None:
    pause = rig.pause()
    pause.outage(True)
    await rig.until(lambda: rig.alarms == ["guest_paused"])
    assert (rig.qemu.status, rig.remembered, pause.paused) == ("paused", [True], True)
    pause.outage(False)
    await rig.until(lambda: rig.remembered == [True, False])
    assert rig.qemu.status == "running"
    assert rig.qemu.commands == ["query-status", "stop", "query-status", "cont"]
    assert rig.alarms == ["guest_paused", "guest_resumed"]
    # And again.
    pause.outage(True)
    await rig.until(lambda: rig.qemu.status == "paused")
    await pause.settled(60)
    assert rig.qemu.status == "running"


async def test_a_short_outage_pauses_nothing(rig: Paused) -> None:
    pause = rig.pause()
    pause.outage(True)
    await asyncio.sleep(0)
    pause.outage(False)
    await asyncio.sleep(0.08)
    assert (rig.qemu.commands, rig.remembered) == ([], [])


async def test_a_guest_that_the_operator_stopped_stays_stopped(rig: Paused) -> None:
    rig.qemu.run_by_hand("stop")
    pause = rig.pause()
    pause.outage(True)
    await rig.until(lambda: rig.qemu.commands == ["query-status"])
    await rig.until(lambda: not rig.qemu.connected.is_set())  # the socket is free meanwhile
    await pause.settled(60)
    assert (rig.qemu.status, rig.qemu.commands, rig.remembered) == ("paused", ["query-status"], [])


async def test_a_guest_that_somebody_else_lets_run_and_stops_is_his(rig: Paused) -> None:
    pause = rig.pause()
    pause.outage(True)
    await rig.until(lambda: rig.alarms == ["guest_paused"])
    rig.qemu.run_by_hand("cont")
    await rig.until(lambda: rig.remembered == [True, False])
    rig.qemu.run_by_hand("stop")
    await pause.settled(60)
    assert (rig.qemu.status, rig.qemu.commands[-1]) == ("paused", "stop")


async def test_a_guest_paused_by_an_earlier_process_goes_on(rig: Paused) -> None:
    rig.qemu.run_by_hand("stop")
    rig.pause(paused=True)
    await rig.until(lambda: rig.remembered == [False])
    assert rig.qemu.status == "running"


async def test_what_an_earlier_process_meant_to_pause_and_did_not_is_let_be(rig: Paused) -> None:
    rig.pause(paused=True)
    await rig.until(lambda: rig.remembered == [False])
    assert rig.qemu.commands == ["query-status"]


async def test_a_stop_that_is_carried_out_after_the_path_is_back_is_taken_back(rig: Paused) -> None:
    pause = rig.pause()
    pause.outage(True)
    await rig.qemu.connected.wait()
    await rig.until(lambda: rig.qemu.commands == ["query-status"] or bool(rig.remembered))
    rig.qemu.hung.clear()  # its main loop waits for a page now
    await asyncio.sleep(0.05)
    pause.outage(False)
    await asyncio.sleep(0.05)
    rig.qemu.hung.set()
    await rig.until(lambda: rig.qemu.status == "running" and rig.remembered[-1:] != [True])


async def test_without_a_qemu_it_is_tried_again_and_told_once(rig: Paused) -> None:
    await rig.qemu.end()
    pause = rig.pause()
    pause.outage(True)
    await rig.until(lambda: rig.alarms == ["guest_not_controlled"])
    await asyncio.sleep(0.08)
    assert rig.alarms == ["guest_not_controlled"]
    await pause.settled(60)


async def test_a_refused_stop_is_not_taken_for_a_pause(rig: Paused) -> None:
    rig.qemu.refused.add("stop")
    pause = rig.pause()
    pause.outage(True)
    await rig.until(lambda: "guest_not_controlled" in rig.alarms)
    assert rig.remembered[:2] == [True, False]
    rig.qemu.refused.clear()
    await rig.until(lambda: rig.qemu.status == "paused")
    await pause.settled(60)
    assert rig.qemu.status == "running"
