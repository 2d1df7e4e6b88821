from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.kernel.victim import Victim

SOURCE = Path(__file__).with_name("victim.c")


@pytest.fixture(scope="session")
def victim_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("victim") / "victim"
    subprocess.run(["gcc", "-O2", "-Wall", "-o", program, SOURCE, "-lpthread"], check=True)
    return program


@pytest.fixture
def start_victim(victim_program: Path) -> Iterator[Callable[..., Victim]]:
    with ExitStack() as stack:

        def start(*arguments: str) -> Victim:
            return stack.enter_context(Victim([str(victim_program), *arguments]))

        yield start
