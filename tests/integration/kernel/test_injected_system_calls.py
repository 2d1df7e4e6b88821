from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from farpage.kernel.inject import (
    ForeignArchitecture,
    ProcessNotFound,
    ProcessTraced,
    TraceRefused,
    call_in_process,
)
from farpage.kernel.injector import ProcessMemory, find_instruction
from farpage.kernel.libc import syscall_numbers
from farpage.kernel.process import read_status
from farpage.kernel.ptrace import call_in_thread
from farpage.kernel.userfaultfd import CREATE_FLAGS
from tests.integration.kernel.victim import Victim

GETPID, GETTID, DUP = 39, 186, 32

StartVictim = Callable[..., Victim]


def wait_for_state(pid: int, states: str) -> None:
    while read_status(pid).state not in states:
        os.sched_yield()


def injections(victim: Victim) -> Iterator[tuple[int, int]]:
    """Yield `(thread, result of gettid)` of calls in all threads in turn, without end."""
    memory = ProcessMemory(victim.pid)
    instruction = find_instruction(victim.pid, memory)
    for thread in itertools.cycle(victim.threads.values()):
        outcome = call_in_thread(thread, GETTID, [], read_memory=memory.read, spare_instruction=instruction)
        yield thread, outcome.result


def test_a_thousand_calls_in_all_threads_change_nothing_and_lose_no_signal(start_victim: StartVictim) -> None:
    victim = start_victim()
    sent = 0
    for thread, result in itertools.islice(injections(victim), 1000):
        assert result == thread
        os.kill(victim.pid, signal.SIGRTMIN)
        sent += 1
    verdict = victim.finish()
    assert (verdict.failures, verdict.messages) == (0, "")
    assert verdict.signals == sent


def test_signals_that_come_while_a_thread_is_stopped_reach_their_handler(start_victim: StartVictim) -> None:
    victim = start_victim()
    done = threading.Event()
    sent = 0

    def send() -> None:
        nonlocal sent
        # Paced: beyond RLIMIT_SIGPENDING the kernel merges signals of kill(2).
        while not done.wait(0.0001):
            os.kill(victim.pid, signal.SIGRTMIN)
            sent += 1

    sender = threading.Thread(target=send)
    sender.start()
    try:
        # Until there were many of both, however the two threads share the processor.
        for calls, (thread, result) in enumerate(injections(victim), 1):
            assert result == thread
            if calls >= 200 and sent > 100:
                break
    finally:
        done.set()
        sender.join()
    verdict = victim.finish()
    assert (verdict.failures, verdict.messages) == (0, "")
    assert verdict.signals == sent > 100


def test_the_helper_process_returns_the_result_and_the_length_of_the_stop(start_victim: StartVictim) -> None:
    victim = start_victim()
    outcome = call_in_process(victim.pid, GETPID)
    assert outcome.result == victim.pid
    assert 0 < outcome.stopped_seconds < 0.5
    assert victim.finish().failures == 0


def test_a_failing_call_returns_its_errno(start_victim: StartVictim) -> None:
    assert call_in_process(start_victim().pid, DUP, 9999).result == -errno.EBADF


def test_a_stopped_process_stays_stopped_and_goes_on_when_continued(start_victim: StartVictim) -> None:
    victim = start_victim()
    os.kill(victim.pid, signal.SIGSTOP)
    wait_for_state(victim.pid, "T")
    assert call_in_process(victim.pid, GETPID).result == victim.pid
    wait_for_state(victim.pid, "T")
    os.kill(victim.pid, signal.SIGCONT)
    verdict = victim.finish()
    assert (verdict.failures, verdict.messages) == (0, "")


def test_a_stop_signal_amid_a_call_takes_effect(start_victim: StartVictim) -> None:
    victim = start_victim()
    calls = injections(victim)
    for _ in range(50):
        os.kill(victim.pid, signal.SIGSTOP)
        thread, result = next(calls)
        assert result == thread
        wait_for_state(victim.pid, "T")
        os.kill(victim.pid, signal.SIGCONT)
        thread, result = next(calls)
        assert result == thread
    verdict = victim.finish()
    assert (verdict.failures, verdict.messages) == (0, "")


def test_a_process_killed_meanwhile_is_reported_as_gone(start_victim: StartVictim) -> None:
    victim = start_victim()
    killer = threading.Timer(0.05, victim.process.kill)
    killer.start()
    with pytest.raises(ProcessNotFound) as caught:
        while True:
            call_in_process(victim.pid, GETPID)
    assert str(victim.pid) in str(caught.value)
    killer.join()


def test_a_caller_killed_at_any_moment_leaves_the_process_whole(start_victim: StartVictim) -> None:
    victim = start_victim()
    code = (
        "import sys\nfrom farpage.kernel.inject import call_in_process\n"
        "print(flush=True)\nwhile True: call_in_process(int(sys.argv[1]), 39)"
    )
    chance = random.Random(1)
    for _ in range(8):
        caller = subprocess.Popen([sys.executable, "-c", code, str(victim.pid)], stdout=subprocess.PIPE)
        assert caller.stdout is not None
        caller.stdout.readline()
        threading.Event().wait(chance.uniform(0, 0.09))
        caller.kill()
        caller.communicate()
    while read_status(victim.pid).tracer_pid:
        os.sched_yield()
    verdict = victim.finish()
    assert (verdict.failures, verdict.messages) == (0, "")


def test_a_zombie_is_reported_as_gone() -> None:
    process = subprocess.Popen(["true"])
    wait_for_state(process.pid, "Z")
    with pytest.raises(ProcessNotFound):
        call_in_process(process.pid, GETPID)
    process.wait()


def test_a_traced_process_is_refused_naming_its_tracer(start_victim: StartVictim) -> None:
    victim = start_victim()
    code = (
        "import sys\nfrom farpage.kernel.ptrace import _SEIZE, _request\n"
        "_request(_SEIZE, int(sys.argv[1]))\nprint(flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(victim.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as tracer:
        assert tracer.stdout is not None
        tracer.stdout.readline()
        with pytest.raises(ProcessTraced, match=f"process {victim.pid} is being traced by {tracer.pid} "):
            call_in_process(victim.pid, GETPID)
        tracer.kill()
    assert victim.finish().failures == 0


def test_a_seccomp_filter_that_kills_does_not_see_the_call(start_victim: StartVictim) -> None:
    victim = start_victim("filtered")
    try:
        assert call_in_process(victim.pid, syscall_numbers().userfaultfd, CREATE_FLAGS).result >= 0
    except TraceRefused as refusal:
        # Kernels without CONFIG_CHECKPOINT_RESTORE cannot suspend the filter.
        assert "seccomp" in str(refusal)
    assert victim.finish().failures == 0


def test_a_32_bit_process_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "pause.c"
    source.write_text('void _start(void) { for (;;) __asm__ volatile("int $0x80" : : "a"(29)); }')
    program = tmp_path / "pause"
    built = subprocess.run(
        ["gcc", "-m32", "-nostdlib", "-static", "-o", program, source], capture_output=True, check=False
    )
    if built.returncode:
        pytest.skip("gcc cannot build 32-bit programs here")
    try:
        process = subprocess.Popen([program])
    except OSError:
        pytest.skip("this kernel runs no 32-bit programs")
    try:
        with pytest.raises(ForeignArchitecture):
            call_in_process(process.pid, GETPID)
    finally:
        process.kill()
        process.wait()


def test_a_process_that_does_not_exist_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ProcessNotFound) as caught:
        call_in_process(2**22 + 1, GETPID)
    assert caught.value.advice


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_a_process_of_another_user_is_refused_naming_that_user() -> None:
    code = (
        "import sys\nfrom farpage.errors import FarpageError\n"
        "from farpage.kernel.inject import call_in_process\n"
        "try: call_in_process(int(sys.argv[1]), 39)\n"
        "except FarpageError as error: print(error.code, error)"
    )
    process = subprocess.Popen(["sleep", "1000"], user=65534, group=65534, extra_groups=[])
    try:
        refused = subprocess.run(
            ["setpriv", "--bounding-set", "-sys_ptrace", sys.executable, "-c", code, str(process.pid)],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        process.kill()
        process.wait()
    assert "trace_refused" in refused.stdout
    assert "runs as user 65534" in refused.stdout
