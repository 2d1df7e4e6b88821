from __future__ import annotations

import errno
import os
import select
import subprocess
import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from farpage.kernel.process import (
    is_exiting,
    is_gone,
    open_thread,
    read_descriptors,
    read_maps,
    read_status,
    read_threads,
    set_oom_score_adjustment,
    take_descriptor,
)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    reader, writer = os.pipe()
    process = subprocess.Popen(["sleep", "1000"], stdin=reader)
    os.close(reader)
    yield process
    os.close(writer)
    process.kill()
    process.wait()


def test_the_map_of_a_process_has_its_stack(sleeper: subprocess.Popen[bytes]) -> None:
    stack = [mapping for mapping in read_maps(sleeper.pid) if mapping.path == "[stack]"]
    assert len(stack) == 1
    assert stack[0].writable
    assert not stack[0].shared
    assert stack[0].memfd_name is None


def test_a_descriptor_of_another_process_can_be_taken(sleeper: subprocess.Popen[bytes]) -> None:
    pidfd = os.pidfd_open(sleeper.pid)
    stdin = next(file for file in read_descriptors(sleeper.pid) if file.number == 0)
    taken = take_descriptor(pidfd, stdin.number)
    assert os.fstat(taken).st_ino == stdin.inode
    assert not os.get_inheritable(taken)
    os.close(taken)
    with pytest.raises(OSError) as caught:
        take_descriptor(pidfd, 999)
    assert caught.value.errno == errno.EBADF
    os.close(pidfd)


def test_a_process_exits_from_when_it_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    assert not is_exiting(sleeper.pid)
    pidfd = os.pidfd_open(sleeper.pid)
    sleeper.kill()
    select.select([pidfd], [], [], 5)
    assert is_exiting(sleeper.pid)  # a zombie, not reaped yet
    sleeper.wait()
    assert is_exiting(sleeper.pid)
    os.close(pidfd)


def test_the_end_of_a_thread_is_seen() -> None:
    end, numbers = threading.Event(), SimpleQueue[int]()

    def run() -> None:
        numbers.put(threading.get_native_id())
        end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        pidfd = open_thread(numbers.get())
    except OSError as error:
        pytest.skip(f"this kernel watches no threads: {error}")
    finally:
        end.set()
    assert select.select([pidfd], [], [], 5)[0]
    thread.join()
    os.close(pidfd)


def test_the_end_of_a_process_is_seen_without_reaping_it(sleeper: subprocess.Popen[bytes]) -> None:
    pidfd = os.pidfd_open(sleeper.pid)
    assert not is_gone(pidfd)
    sleeper.kill()
    select.select([pidfd], [], [], 5)
    assert is_gone(pidfd)
    os.close(pidfd)


def test_the_status_of_a_process_names_it_and_its_threads(sleeper: subprocess.Popen[bytes]) -> None:
    status = read_status(sleeper.pid)
    assert status.tracer_pid == 0
    assert status.user_id == os.geteuid()
    assert not status.seccomp_filtered
    assert read_threads(sleeper.pid) == [sleeper.pid]


def test_a_process_can_be_made_a_likelier_victim_of_memory_shortage(
    sleeper: subprocess.Popen[bytes],
) -> None:
    set_oom_score_adjustment(500, sleeper.pid)
    with open(f"/proc/{sleeper.pid}/oom_score_adj") as file:
        assert file.read().strip() == "500"


def test_a_process_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        read_status(2**22 + 1)
    with pytest.raises(FileNotFoundError):
        read_maps(2**22 + 1)
