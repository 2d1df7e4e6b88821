from __future__ import annotations

import os

import pytest

from farpage.demo.resident import NoMemfd, ResidentWatch, find_memfd, resident_bytes


def test_the_memfd_tells_what_is_resident() -> None:
    memory = os.memfd_create("guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, 300 << 20)
        found = find_memfd(os.getpid(), 300 << 20)
        assert resident_bytes(found) == 0
        os.pwrite(memory, b"x" * 8192, 1 << 20)
        assert resident_bytes(found) == 8192
    finally:
        os.close(memory)


def test_a_process_without_such_a_memfd_is_an_error() -> None:
    with pytest.raises(NoMemfd):
        find_memfd(os.getpid(), 1 << 50)


def test_the_maximum_counts_from_when_the_limit_was_reached() -> None:
    watch = ResidentWatch(limit_bytes=100)
    for value in (300, 200, 101):
        watch.sample(value)
    assert watch.max_bytes == 0
    for value in (100, 104, 90):
        watch.sample(value)
    assert (watch.max_bytes, watch.latest_bytes) == (104, 90)
