from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from farpage.device import freeing

PIECE = 1 << 16


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeing, "PIECE_BYTES", PIECE)


def sparse_file(path: Path) -> int:
    """Make a file with data in the middle and at the end; returns a descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    for piece in (3, 4, 9):
        os.pwrite(descriptor, b"x" * PIECE, piece * PIECE)
    return descriptor


def wait_until_closed(descriptor: int) -> None:
    """Wait until a number is no descriptor of this process any more."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/self/fd/{descriptor}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_room_of_a_file_without_a_name_is_given_back_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    descriptor = sparse_file(path)
    witness = os.dup(descriptor)
    path.unlink()
    sizes: list[int] = []
    truncate = os.ftruncate

    def watched(number: int, size_bytes: int) -> None:
        sizes.append(size_bytes // PIECE)
        truncate(number, size_bytes)

    monkeypatch.setattr(os, "ftruncate", watched)
    freeing.free_slowly(descriptor)
    wait_until_closed(descriptor)
    assert sizes == [9, 4, 3]
    assert os.fstat(witness).st_blocks == 0
    os.close(witness)


def test_a_file_that_has_another_name_keeps_what_it_holds(tmp_path: Path) -> None:
    path, kept = tmp_path / "file", tmp_path / "kept"
    descriptor = sparse_file(path)
    kept.hardlink_to(path)
    path.unlink()
    freeing.free_slowly(descriptor)
    wait_until_closed(descriptor)
    assert kept.read_bytes()[9 * PIECE :] == b"x" * PIECE
