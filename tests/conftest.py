from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from farpage.cli.main import LOADED_FASTER

# As in the processes of the command, in those of tests that are started without it.
os.environ.update(LOADED_FASTER | os.environ)

# How long an example takes, or its drawing, says something about the machine's load here, not about the code.
# The examples are the same in each run; `--hypothesis-profile search` looks for others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("farpage", settings.get_profile("search"), derandomize=True)
settings.load_profile("farpage")

# What takes longest is begun first, so that no process of the test run is left alone with it at the end.
# The campaign lasts its minutes whatever happens beside it: the simulation computes meanwhile. Then come
# those that wait for daemons, and last the unit tests, which are many and short.
FIRST = ("faults/test_campaign.py", "simulation", "guest", "faults", "claims", "integration", "interop")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests in the order in which `--dist loadfile --no-loadscope-reorder` hands their files out."""
    here = Path(__file__).parent

    def turn(item: pytest.Item) -> int:
        place = item.path.relative_to(here).as_posix()
        return next((n for n, first in enumerate(FIRST) if place.startswith(first)), len(FIRST))

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through all modules of all tests again and again."""
    gc.collect()
    gc.freeze()
