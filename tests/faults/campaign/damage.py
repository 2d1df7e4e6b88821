"""Damage to a volume's file, behind the back of whoever serves it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path

PAGE_BYTES = 4096


def flip_bits(volume: Path, pages: int, seed: int) -> int:
    """Flip one bit in each of up to `pages` pages of a file that hold anything; returns in how many."""
    dice = random.Random(f"farpage damage {seed}")
    count = volume.stat().st_size // PAGE_BYTES
    return flip_pages(volume, dice.sample(range(count), min(pages, count)), dice)


def flip_pages(volume: Path, pages: Iterable[int], dice: random.Random | None = None) -> int:
    """Flip one bit in each of these pages of a file that hold anything; returns in how many."""
    dice = dice or random.Random("farpage damage")
    damaged = 0
    descriptor = os.open(volume, os.O_RDWR | os.O_CLOEXEC)
    try:
        for page in pages:
            content = os.pread(descriptor, PAGE_BYTES, page * PAGE_BYTES)
            if any(content):
                place = dice.randrange(PAGE_BYTES)
                flipped = bytes([content[place] ^ 1 << dice.randrange(8)])
                os.pwrite(descriptor, flipped, page * PAGE_BYTES + place)
                damaged += 1
        # Not to lie in the page cache, where direct I/O does not look, or be written over later writes.
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return damaged
