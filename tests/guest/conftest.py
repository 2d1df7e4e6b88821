from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from farpage.embedded.set import EmbeddedSet, SetSettings
from tests.guest.support import boot_guest, guest_image

__all__ = ["boot_guest", "embedded", "guest_image"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedded() -> AsyncIterator[EmbeddedSet]:
    """A set of two VIOS on a common device and a hypervisor, for a module."""
    folder = Path(tempfile.mkdtemp(prefix="fpguest-", dir="/tmp"))
    running = EmbeddedSet(SetSettings(state_dir=folder / "s", workers=1))
    await running.start()
    try:
        yield running
    finally:
        await running.stop()
        shutil.rmtree(folder)
