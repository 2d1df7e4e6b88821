from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from farpage.embedded.set import EmbeddedSet, SetSettings
from tests.support.paged_set import PagedSet, RegionProcess

PAGES = 4096
LIMIT_BYTES = 4 << 20


@pytest.fixture
async def paged() -> AsyncIterator[PagedSet]:
    """A set of two VIOS on a common device, and a client of 16 MiB that may keep a quarter in memory."""
    folder = Path(tempfile.mkdtemp(prefix="fpfault-", dir="/tmp"))
    embedded = EmbeddedSet(SetSettings(state_dir=folder / "s", workers=1))
    await embedded.start()
    try:
        client = await RegionProcess.start(folder / "s", PAGES, LIMIT_BYTES)
        try:
            yield PagedSet(embedded, client, PAGES)
        finally:
            await client.stop()
    finally:
        for vios in embedded.vioses:
            if embedded.vios_pid(vios):
                embedded.kill_vios(vios, signal.SIGCONT)
        await embedded.stop()
        shutil.rmtree(folder)
