"""The command as a process: exit status, streams, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farpage.errors import ExitStatus
from tests.support.running_set import Watched, descendants, eventually, read_document, wrong_pages


@pytest.fixture
def state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fpup-", dir="/tmp") as folder:
        yield Path(folder) / "s"


def farpage(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "farpage", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def start_up(state: Path, *options: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "farpage", "up", "--state", str(state), "--workers", "1", "--json", *options],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def test_version_and_help_need_no_set() -> None:
    assert farpage("--version").stdout.startswith("farpage ")
    assert "hypervisor" in farpage("--help").stdout


def test_without_a_set_the_remedy_is_to_start_one(state: Path) -> None:
    done = farpage("client", "list", FARPAGE_STATE=str(state))
    assert done.returncode == ExitStatus.UNREACHABLE
    assert f"farpage up --state {state}" in done.stderr


def test_a_wrong_option_is_a_usage_error_with_a_pointer_to_help() -> None:
    done = farpage("client", "create", "x", "--momory", "1G")
    assert done.returncode == ExitStatus.USAGE
    assert "see 'farpage client create --help'" in done.stderr


def test_the_command_alone_prints_its_help_and_no_problem() -> None:
    done = farpage()
    assert (done.returncode, "Start with: farpage demo" in done.stdout, done.stderr) == (2, True, "")


def test_a_traceback_comes_only_when_asked_for(state: Path) -> None:
    done = farpage("client", "list", FARPAGE_STATE=str(state), FARPAGE_DEBUG="1")
    assert "Traceback" in done.stderr


def test_ctrl_c_stops_the_daemons_and_leaves_no_socket(state: Path) -> None:
    up = start_up(state)
    document = read_document(up)
    children = descendants(up.pid)
    assert len(children) >= 4
    watched = Watched(children)
    second = farpage("up", "--state", str(state))
    assert second.returncode == ExitStatus.CONFLICT
    assert str(state) in second.stderr
    up.send_signal(signal.SIGINT)
    assert up.wait(timeout=120) == 0
    assert up.stdout is not None
    up.stdout.close()
    assert watched.still_running(timeout_seconds=60) == 0
    assert not list(state.rglob("*.sock"))
    assert json.loads((state / "set.json").read_text()) == document


def test_ctrl_c_without_a_vios_says_how_to_go_on_and_that_works(
    state: Path, memory_process: subprocess.Popen[str]
) -> None:
    up = start_up(state, "--no-direct-reads", stderr=subprocess.PIPE)
    read_document(up)

    def answer(*arguments: str) -> dict[str, Any]:
        done = farpage(*arguments, "--state", str(state), "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    answer("client", "attach", "job", "--pid", str(memory_process.pid), "--limit", "4M")
    eventually(lambda: answer("client", "show", "job")["resident_bytes"], lambda size: bool(size <= 4 << 20))
    answer("vios", "stop", "vios1")
    answer("vios", "stop", "vios2", "--force")
    up.send_signal(signal.SIGINT)
    assert up.stderr is not None
    said = next(line for line in up.stderr if "vios start" in line)
    assert "vios1, vios2" in said
    advice = said[said.index("'farpage ") + len("'farpage ") : said.rindex("'")]
    started = farpage(*advice.split())
    assert started.returncode == 0, started.stderr
    assert "".join(up.stderr)
    assert up.wait(timeout=120) == 0
    assert wrong_pages(memory_process) == 0
    for stream in (up.stdout, up.stderr):
        assert stream is not None
        stream.close()


def test_the_daemons_do_not_outlive_a_killed_up(state: Path) -> None:
    up = start_up(state)
    read_document(up)
    watched = Watched(descendants(up.pid))
    up.kill()
    up.wait()
    assert up.stdout is not None
    up.stdout.close()
    assert watched.still_running(timeout_seconds=60) == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--vios-count", "0"], "--vios-count"),
        (["--path-timeout", "never"], "--path-timeout"),
        (["--limit", "lots"], "--limit"),
        (["--workers", "0"], "--workers"),
        (["--worker-cpus", "some"], "--worker-cpus"),
        (["--worker-cpus", "8191"], "--worker-cpus"),
        (["--device", "tape:1"], "tape:1"),
    ],
)
def test_up_refuses_what_it_cannot_do_and_leaves_nothing_running(
    state: Path, options: list[str], word: str
) -> None:
    done = farpage("up", "--state", str(state), *options)
    assert done.returncode == ExitStatus.USAGE, done.stderr
    assert word in done.stderr
    assert not list(state.rglob("*.sock"))


def test_a_state_folder_with_too_long_a_path_is_refused(state: Path) -> None:
    done = farpage("up", "--state", str(state / ("x" * 100)))
    assert done.returncode == ExitStatus.USAGE
    assert "shorter folder" in done.stderr
    assert not state.exists()
