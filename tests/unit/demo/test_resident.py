from __future__ import annotations

import os

import pytest

from farpage.demo.resident import Memfd, NoMemfd, ResidentWatch

SIZE = 301 << 20


def test_the_memfd_tells_what_is_resident() -> None:
    memory = os.memfd_create("guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, SIZE)
        with Memfd([os.getpid()], SIZE) as found:
            assert found.resident_bytes == 0
            os.pwrite(memory, b"x" * 8192, 1 << 20)
            assert found.resident_bytes == 8192
    finally:
        os.close(memory)


def test_processes_without_such_a_memfd_are_named() -> None:
    with pytest.raises(NoMemfd) as caught:
        Memfd([os.getpid(), 1 << 30], 1 << 50)
    assert str(1 << 30) in caught.value.cause


def test_the_maximum_counts_from_when_the_limit_was_reached() -> None:
    watch = ResidentWatch(limit_bytes=100)
    for value in (300, 200, 101):
        watch.sample(value)
    assert watch.max_bytes == 0
    for value in (100, 104, 90):
        watch.sample(value)
    assert (watch.max_bytes, watch.latest_bytes) == (104, 90)
