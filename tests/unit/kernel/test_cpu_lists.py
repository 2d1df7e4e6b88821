"""Lists of CPUs as people and the kernel write them, and where threads may run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.errors import InvalidInput
from farpage.kernel.affinity import (
    CPU_COUNT_MAX,
    confine,
    cpus_by_thread,
    cpus_of,
    format_cpus,
    own_cpus,
    parse_cpus,
    thread_name,
)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), ("8, 1-2,2", {1, 2, 8}), ("5-5", {5})],
)
def test_a_list_names_cpus_and_ranges(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize(
    "text", ["", ",", "0,", "a", "-1", "0-", "3-1", "0-8:2", "0x1", "8192", "0-99999", "²"]
)
def test_anything_else_is_refused_by_the_name_of_its_field(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^--cpus: .*; write "):
        parse_cpus(text, field="--cpus")


@pytest.mark.parametrize(
    ("cpus", "text"), [(set(), ""), ({0}, "0"), ({0, 1}, "0-1"), ({8, 0, 2, 3, 1, 10}, "0-3,8,10")]
)
def test_a_list_is_written_as_short_as_it_can_be(cpus: set[int], text: str) -> None:
    assert format_cpus(cpus) == text


@given(st.frozensets(st.integers(0, CPU_COUNT_MAX - 1), min_size=1, max_size=60))
def test_what_is_written_is_read_as_the_same(cpus: frozenset[int]) -> None:
    assert parse_cpus(format_cpus(cpus)) == cpus


def test_each_thread_of_a_process_is_looked_at_and_moved() -> None:
    program = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}; print('ready', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            threads = cpus_by_thread(process.pid)
            assert len(threads) == 2
            assert set(threads.values()) == {own_cpus()}
            assert {thread_name(process.pid, thread) for thread in threads} != {""}
            one = frozenset([max(own_cpus())])
            confine(process.pid, one)
            assert cpus_by_thread(process.pid) == dict.fromkeys(threads, one)
        finally:
            process.kill()
    assert (cpus_of(process.pid), cpus_by_thread(process.pid), thread_name(process.pid, process.pid)) == (
        None,
        {},
        "",
    )
    with pytest.raises(ProcessLookupError):
        confine(process.pid, one)


def test_cpus_that_the_machine_does_not_have_are_refused_by_the_kernel() -> None:
    before = own_cpus()
    with pytest.raises(OSError, match="Invalid argument"):
        confine(os.getpid(), frozenset([CPU_COUNT_MAX - 1]))
    assert own_cpus() == before
