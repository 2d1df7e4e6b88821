from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from farpage.device import directory
from farpage.device.base import PagingDevice
from farpage.device.open import open_device

MODES = {
    "direct": "dir:{path}?size=16M",
    "dropped": "dir:{path}?size=16M",
    "buffered": "dir:{path}?size=16M&cache=buffered",
    "full": "dir:{path}?size=16M&allocate=full",
    "memory": "memory:16M",
}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """How the device's storage is accessed."""
    return str(request.param)


@pytest.fixture
async def device(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PagingDevice]:
    """An empty device of 16 MiB."""
    if mode == "dropped":
        monkeypatch.setattr(directory, "_direct_works", lambda _folder: False)
    opened = await open_device(MODES[mode].format(path=tmp_path / "device"))
    yield opened
    await opened.close()


@contextlib.asynccontextmanager
async def opening(spec: str) -> AsyncIterator[PagingDevice]:
    """Open a device for a while."""
    opened = await open_device(spec)
    try:
        yield opened
    finally:
        await opened.close()
