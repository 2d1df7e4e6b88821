"""What a client has written is never lost with the worker that let it write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from farpage.pager.compiled import COMPILED

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(COMPILED is None, reason="the compiled loops were not built")


@pytest.fixture(scope="module")
def kill_after_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("kill") / "kill_after_copy.so"
    compiler = shutil.which("gcc")
    assert compiler is not None
    source = Path(__file__).with_name("kill_after_copy.c")
    subprocess.run(
        [compiler, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True
    )
    return library


@pytest.mark.parametrize("way", ["tier", "device"])
def test_a_write_to_a_page_that_has_just_come_in_outlives_a_pager_that_is_killed_then(
    kill_after_copy: Path, way: str
) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "tests.integration.pager.killed_pager", way],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(kill_after_copy)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert found.stdout.split() == ["written", "dirty", "True"], found.stderr
