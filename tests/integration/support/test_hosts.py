from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.support.hosts import FarpageProcess, Hosts, hosts

CHAIN = [("one", "two"), ("two", "three")]


def namespaces() -> set[str]:
    """Return those that this process has made."""
    return {entry.name for entry in Path("/run/netns").glob(f"fp{os.getpid()}-*")}


def listener(made: Hosts, name: str) -> socket.socket:
    with made[name].entered():
        return socket.create_server((made[name].address, 0))


def test_hosts_reach_those_alone_that_a_link_leads_to() -> None:
    with hosts(("one", "two", "three"), CHAIN) as made:
        with listener(made, "three") as server:
            port = server.getsockname()[1]
            assert made["three"].connect(made["three"], port) == ""
            assert made["two"].connect(made["three"], port) == ""
            assert made["one"].connect(made["three"], port) == "ENETUNREACH"
            made.unlink("two", "three")
            assert made["two"].connect(made["three"], port) == "ENETUNREACH"
            made.link("one", "three")
            assert made["one"].connect(made["three"], port) == ""
        assert made["one"].connect(made["two"], 1) == "ECONNREFUSED"


def test_nothing_stays_behind_after_a_failure() -> None:
    class Failure(Exception):
        pass

    before, home = namespaces(), Path("/proc/thread-self/ns/net").readlink()
    with pytest.raises(Failure), hosts(("one",), []) as made:
        assert namespaces() - before == {made["one"].namespace}
        with made["one"].entered():
            raise Failure
    assert namespaces() == before
    assert Path("/proc/thread-self/ns/net").readlink() == home


async def test_a_process_runs_on_its_host(tmp_path: Path) -> None:
    with hosts(("one",), []) as made:
        process = FarpageProcess(made["one"], "vios", tmp_path / "log", ["--version"])
        try:
            assert await process.ended() == 0
            assert process.log().startswith("farpage ")
            with made["one"].entered():
                own = os.readlink("/proc/thread-self/ns/net")  # noqa: PTH115
            assert own != os.readlink("/proc/self/ns/net")  # noqa: PTH115
        finally:
            process.kill()
