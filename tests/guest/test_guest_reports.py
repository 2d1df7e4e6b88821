from __future__ import annotations

import asyncio
import itertools
import os

import numpy as np
import pytest

from farpage.attach.process import close_process, open_process
from farpage.attach.qmp import QmpFailed
from farpage.guest.qemu import GuestFailed, GuestOptions
from farpage.guest.reports import Ended, Filled, PassDone, Progress, Started, WrongWord
from tests.guest.support import BOOT_TIMEOUT_SECONDS, BootGuest

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

WORD_STEP = 0xD1342543DE82EF95
"""From one word of a checked page to the next, as in verify.c."""

SMALL = GuestOptions(memory_mib=160, fill_mib=32)


async def test_a_guest_fills_verifies_rewrites_and_powers_off(boot_guest: BootGuest) -> None:
    guest = await boot_guest(GuestOptions(memory_mib=160, fill_mib=32, passes=3))
    end = await guest.wait_for(lambda report: isinstance(report, Ended), BOOT_TIMEOUT_SECONDS)
    assert end == Ended(wrong=0)
    kinds = [kind for kind, _ in itertools.groupby(guest.reports, type)]
    assert kinds == [Started, Filled, *(Progress, PassDone) * 3, Ended]
    passes = [report for report in guest.reports if isinstance(report, PassDone)]
    assert [(done.number, done.pages, done.wrong, done.rewritten) for done in passes] == [
        (number, 8192, 0, 2048) for number in (1, 2, 3)
    ]
    assert all(0 < done.longest_stall_ms <= done.seconds * 1000 for done in passes)


async def test_a_guest_notices_memory_changed_behind_its_back(boot_guest: BootGuest) -> None:
    guest = await boot_guest(SMALL)
    first = await guest.wait_for(lambda report: isinstance(report, PassDone), BOOT_TIMEOUT_SECONDS)
    assert isinstance(first, PassDone)
    memory = await asyncio.to_thread(open_process, guest.pid)
    words = np.frombuffer(os.pread(memory.memfd, memory.length_bytes, 0), np.uint64).reshape(-1, 512)
    checked = np.flatnonzero((np.diff(words[:, :16], axis=1) == WORD_STEP).all(axis=1))
    assert len(checked) >= first.pages
    for page in checked[:: len(checked) // 8]:
        os.pwrite(memory.memfd, bytes(8), int(page) * 4096 + 256 * 8)
    await asyncio.to_thread(close_process, memory)
    await guest.wait_for(
        lambda report: isinstance(report, PassDone | Progress) and report.wrong > 0, BOOT_TIMEOUT_SECONDS
    )
    assert any(isinstance(report, WrongWord) and report.word == 256 for report in guest.reports)


async def test_a_guest_runs_shell_commands_and_tells_their_statuses(boot_guest: BootGuest) -> None:
    commands = ("which memtester", "exit 7", "echo from the guest", "kill -9 $$")
    guest = await boot_guest(GuestOptions(memory_mib=128, commands=commands))
    assert await guest.command_statuses(BOOT_TIMEOUT_SECONDS) == [0, 7, 0, 137]
    assert "from the guest" in guest.console


async def test_a_guest_answers_qmp_and_is_gone_after_stop(boot_guest: BootGuest) -> None:
    guest = await boot_guest(SMALL)
    await guest.wait_for(lambda report: isinstance(report, Started), BOOT_TIMEOUT_SECONDS)
    await guest.qmp("stop")
    assert (await guest.qmp("query-status"))["status"] == "paused"
    with pytest.raises(QmpFailed, match="no-such-command"):
        await guest.qmp("no-such-command")
    await guest.stop()
    assert not guest.running
    with pytest.raises(GuestFailed, match="ended"):
        await guest.wait_for(lambda report: isinstance(report, Ended), BOOT_TIMEOUT_SECONDS)


async def test_a_guest_that_does_not_report_in_time_is_an_error_with_its_console(
    boot_guest: BootGuest,
) -> None:
    guest = await boot_guest(SMALL)
    with pytest.raises(GuestFailed, match=r"did not report in 0\.05 s"):
        await guest.wait_for(lambda report: False, 0.05)
