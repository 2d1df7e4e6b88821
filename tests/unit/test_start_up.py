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
COMMAND_LINES = {"rich", "click", "pygments"}
"""What httpx would load for its own command."""


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


def test_who_asks_daemons_does_not_load_a_command_line_for_it() -> None:
    program = "import sys, farpage.api.http; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "httpx" in loaded
    assert loaded & COMMAND_LINES == set()


def test_a_daemon_whose_control_api_computes_goes_on_with_what_clients_wait_for() -> None:
    program = "import sys, farpage.daemon as daemon; daemon.begin_to_start(); print(sys.getswitchinterval())"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert float(done.stdout) <= 0.001
