"""A VIOS and a hypervisor that talk to each other, and are talked to, over TCP."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from farpage.cli.main import main
from farpage.embedded.layout import SetDocument, SetHypervisor, SetVios, StateLayout
from farpage.errors import ExitStatus
from tests.support.certificates import certificate_folder
from tests.support.nbd import short_folder

START_SECONDS = 60.0
ANY_PORT = "tcp:127.0.0.1:0"
PORT = re.compile(r"tcp:127\.0\.0\.1:[1-9][0-9]*")


@dataclass
class Daemon:
    process: subprocess.Popen[bytes]
    control: str
    data: str = ""


@contextmanager
def daemon(log: Path, *arguments: str) -> Iterator[Daemon]:
    """Run a daemon until the end; it is ready when it has said at which ports it listens."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "farpage", *arguments], stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            ports = PORT.findall(log.read_text())
            if ports:
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield Daemon(process, *ports)
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def test_daemons_and_commands_work_over_tcp_with_certificates(capsys: pytest.CaptureFixture[str]) -> None:
    def farpage(*words: str) -> tuple[int, str, str]:
        status = main([*words, "--state", str(state.root)])
        return status, *capsys.readouterr()

    with short_folder() as folder, ExitStack() as stack:
        tls = str(certificate_folder(folder / "tls", trustme.CA(), "127.0.0.1"))
        state = StateLayout.at(folder / "s")
        common = ["--control", ANY_PORT, "--tls", tls]
        vios = stack.enter_context(
            daemon(
                folder / "v.log",
                *("vios", "run", "one", "--dir", f"{folder}/v", "--device", f"dir:{folder}/disk", *common),
                *("--data", ANY_PORT),
            )
        )
        assert (folder / "v" / "control.sock").is_socket()
        hypervisor = stack.enter_context(
            daemon(
                folder / "h.log",
                *("hypervisor", "run", "host", "--dir", f"{folder}/h", "--vios", f"one={vios.control}"),
                *("--workers", "1", *common),
            )
        )
        described = SetHypervisor(
            name="host", control=hypervisor.control, attach=f"unix:{folder}/h/attach.sock"
        )
        server = SetVios(control=vios.control, data=(vios.data,))
        state.create_root()
        state.create(SetDocument(hypervisor=described, vioses={"one": server}))

        status, out, _ = farpage("--tls", tls, "definition", "show", "--json")
        assert (status, json.loads(out)["vioses"]["one"]["control"]) == (0, vios.control)
        assert json.loads(out)["vioses"]["one"]["data"] == [vios.data]
        status, _, err = farpage("vios", "show", "one")
        assert (status, "--tls DIR" in err) == (ExitStatus.USAGE, True)
        strange = str(certificate_folder(folder / "strange", trustme.CA(), "127.0.0.1"))
        status, _, err = farpage("--tls", strange, "vios", "list")
        assert (status, "not one of our CA" in err) == (ExitStatus.UNREACHABLE, True)

        state.create(SetDocument(hypervisor=described, vioses={"one": server}, tls=Path(tls)))
        status, out, _ = farpage("vios", "list", "--json")
        assert (status, json.loads(out)[0]["reachable"]) == (0, True)
        assert farpage("vios", "stop", "one")[0] == 0
        assert vios.process.wait(START_SECONDS) == 0


@pytest.mark.parametrize("noun", ["vios", "hypervisor"])
def test_a_daemon_without_usable_certificates_starts_nothing(
    noun: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = [noun, "run", "one", "--dir", str(tmp_path / "d"), "--control", ANY_PORT]
    line += ["--vios", "v=unix:/v"] if noun == "hypervisor" else []
    for more, words in (([], "--tls DIR"), (["--tls", str(tmp_path / "none")], "ca.pem: no such file")):
        assert main([*line, *more]) == ExitStatus.USAGE
        assert words in capsys.readouterr().err
        assert list((tmp_path / "d").iterdir()) == []
