"""What processes load before they serve: guests may wait for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SLOW = {
    "pydantic",
    "fastapi",
    "starlette",
    "uvicorn",
    "httpx",
    "rich",
    "typer",
    "prometheus_client",
    "lz4",
    "numpy",
}


@pytest.mark.parametrize(
    ("module", "may_load"),
    [
        ("farpage.pager.worker", {"numpy"}),
        ("farpage.hypervisor.daemon", {"pydantic"}),
        ("farpage.vios.daemon", {"pydantic"}),
    ],
)
def test_what_guests_wait_for_loads_no_library_that_it_does_not_need(module: str, may_load: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded & (SLOW - may_load) == set()
