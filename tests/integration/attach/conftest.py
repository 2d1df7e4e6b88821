from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the name of a UNIX socket."""
    folder = Path(tempfile.mkdtemp(prefix="farpage-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)
