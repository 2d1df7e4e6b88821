from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nbd import short_folder
from tests.support.vios import ViosProcess, vios_processes


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as made:
        yield made


@pytest.fixture(scope="module")
def vios() -> Iterator[ViosProcess]:
    """One running VIOS with a directory of 64 MiB for a module; its tests use volumes of their own."""
    with (
        short_folder() as made,
        vios_processes(made, "one", devices=[f"dir:{made}/disk?size=64M"]) as (process,),
    ):
        yield process
