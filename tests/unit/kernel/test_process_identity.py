"""Processes told apart from later ones of the same number."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

from farpage.kernel.process import identify, open_identified


def test_a_process_is_found_by_its_identity() -> None:
    pidfd = open_identified(identify(os.getpid()))
    assert pidfd is not None
    os.close(pidfd)


def test_another_process_of_the_same_number_is_not_taken_for_it() -> None:
    own = identify(os.getpid())
    assert open_identified(dataclasses.replace(own, started_ticks=own.started_ticks - 1)) is None
    assert open_identified(dataclasses.replace(own, boot="before")) is None


def test_a_process_that_has_ended_is_not_found_before_or_after_it_is_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = identify(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert open_identified(identity) is None
    child.communicate()
    assert open_identified(identity) is None
