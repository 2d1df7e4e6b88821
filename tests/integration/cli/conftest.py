"""A real set for the commands: `farpage up` in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from farpage.cli.main import main
from tests.support.running_set import Answer, Farpage, RunningSet, read_document


@pytest.fixture(scope="module")
def running_set() -> Iterator[RunningSet]:
    with tempfile.TemporaryDirectory(prefix="fpcli-", dir="/tmp") as folder:
        state = Path(folder) / "s"
        with (Path(folder) / "up.err").open("w") as errors:
            # Without a RAM tier, which keeps samples of the pages whose only copy a test may spoil.
            options = ["--workers", "1", "--ram-tier", "0", "--json"]
            process = subprocess.Popen(
                [sys.executable, "-m", "farpage", "up", "--state", str(state), *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            yield RunningSet(state, process, read_document(process))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def farpage(
    running_set: RunningSet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Farpage:
    """Run a command line against the set, in this process."""
    monkeypatch.setenv("FARPAGE_STATE", str(running_set.state))

    def run(*arguments: str) -> Answer:
        status = main(list(arguments))
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return run


@pytest.fixture
def memory_process() -> Iterator[subprocess.Popen[str]]:
    """A process with 16 MiB of shared memory whose pages hold their numbers; it checks them when asked."""
    process = subprocess.Popen(
        [sys.executable, "-c", MEMORY_PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


MEMORY_PROGRAM = """
import mmap, os, sys
SIZE = 16 << 20
fd = os.memfd_create("memory")
os.ftruncate(fd, SIZE)
memory = mmap.mmap(fd, SIZE)
PAGES = range(SIZE // 4096)
for page in PAGES:
    memory[page * 4096 : page * 4096 + 8] = (page + 1).to_bytes(8, "little")
print("ready", flush=True)
for _ in sys.stdin:
    wrong = sum(memory[page * 4096 : page * 4096 + 8] != (page + 1).to_bytes(8, "little") for page in PAGES)
    print(wrong, flush=True)
"""
