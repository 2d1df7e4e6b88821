"""Guests for tests: an image that is built once, and booted guests that end with their test.

Use it by importing its fixtures into a conftest.py.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.guest.image import MEMTESTER, GuestImage, build_image
from farpage.guest.qemu import GuestOptions, QemuGuest

BOOT_TIMEOUT_SECONDS = 180.0
"""A boot takes 5 s on an idle machine."""

BootGuest = Callable[[GuestOptions], Awaitable[QemuGuest]]


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """The kernel and an initramfs with memtester, from the user's cache."""
    return build_image(programs=[MEMTESTER])


@pytest_asyncio.fixture(loop_scope="module")
async def boot_guest(guest_image: GuestImage) -> AsyncIterator[BootGuest]:
    """Start guests, without waiting for their boot; they end with the test."""
    async with AsyncExitStack() as stack:

        async def boot(options: GuestOptions) -> QemuGuest:
            return await stack.enter_async_context(booted(guest_image, options))

        yield boot


@asynccontextmanager
async def booted(image: GuestImage, options: GuestOptions) -> AsyncIterator[QemuGuest]:
    """Start a guest, without waiting for its boot."""
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="farpage-", dir="/tmp"))
    try:
        async with QemuGuest(image, options, folder) as guest:
            yield guest
    finally:
        await asyncio.to_thread(shutil.rmtree, folder)
