"""Guests for tests: an image that is built once, and booted guests that end with their test.

Use it by importing its fixtures into a conftest.py.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from farpage.guest.image import MEMTESTER, GuestImage, build_image
from farpage.guest.qemu import GuestOptions, QemuGuest

BOOT_TIMEOUT_SECONDS = 60.0
"""A boot takes 5 s on an idle machine."""

BootGuest = Callable[[GuestOptions], Awaitable[QemuGuest]]


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """The kernel and an initramfs with memtester, from the user's cache."""
    return build_image(programs=[MEMTESTER])


@pytest.fixture
async def boot_guest(guest_image: GuestImage) -> AsyncIterator[BootGuest]:
    """Start guests, without waiting for their boot; they end with the test."""
    async with AsyncExitStack() as stack:

        async def boot(options: GuestOptions) -> QemuGuest:
            folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="farpage-", dir="/tmp"))
            stack.push_async_callback(asyncio.to_thread, shutil.rmtree, folder)
            return await stack.enter_async_context(QemuGuest(guest_image, options, folder))

        yield boot
