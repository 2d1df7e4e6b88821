from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.hammer import compile_hammer


@pytest.fixture(scope="session")
def hammer_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_hammer(tmp_path_factory.mktemp("hammer"))
