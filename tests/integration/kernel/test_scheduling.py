"""A thread's slice, as the kernel has it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from farpage.kernel.scheduling import LONGEST_SLICE_SECONDS, set_slice
from tests.support.processes import slice_of

pytestmark = pytest.mark.skipif(
    slice_of(threading.get_native_id()) == 0, reason="threads have no slices of their own before Linux 6.12"
)


def in_thread(run: Callable[[], None]) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_a_thread_has_the_slice_that_it_asks_for_alone() -> None:
    usual = slice_of(threading.get_native_id())
    found: list[float] = []

    def run() -> None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        set_slice(LONGEST_SLICE_SECONDS)
        found.append(slice_of(threading.get_native_id()))
        assert os.getpriority(os.PRIO_PROCESS, 0) == nice
        set_slice(0)
        found.append(slice_of(threading.get_native_id()))

    in_thread(run)
    assert found == [LONGEST_SLICE_SECONDS, usual]
    assert slice_of(threading.get_native_id()) == usual


def test_a_thread_of_another_class_stays_as_it_is() -> None:
    found: list[int] = []

    def run() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        set_slice(LONGEST_SLICE_SECONDS)
        found.append(os.sched_getscheduler(0))

    in_thread(run)
    assert found == [os.SCHED_IDLE]
