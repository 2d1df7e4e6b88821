"""Hosts of a test: network namespaces with links between them, and processes that run in them.

A host has one address, whichever of its links is used; it reaches those hosts alone that a link leads to,
because nobody forwards packets. Files, and so UNIX sockets, are common to all. Needs root and ip(8).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DEADLINE_SECONDS = 60.0
CONNECT_SECONDS = 5.0

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
CLONE_NEWNET = 0x40000000
"""linux/sched.h"""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


_libc = ctypes.CDLL(None, use_errno=True)


def _enter(namespace: Path) -> None:
    """Let this thread make its sockets in another network namespace from now on (setns(2))."""
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Host:
    """A network namespace with an address."""

    name: str
    namespace: str
    address: str

    @property
    def launcher(self) -> tuple[str, ...]:
        """What a command on this host is started by; it becomes the command, with the same process number."""
        return ("nsenter", f"--net=/run/netns/{self.namespace}", "--")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make sockets of this thread on this host; they stay there, and the thread comes back."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(Path("/run/netns", self.namespace))
            yield
        finally:
            _enter(Path(f"/proc/self/fd/{home}"))
            os.close(home)

    def tcp(self, port: int) -> str:
        """Return a port of this host as farpage spells it."""
        return f"tcp:{self.address}:{port}"

    def connect(self, other: Host, port: int) -> str:
        """Connect from here to a port of a host; return the error's name, nothing where there is none."""
        with self.entered(), socket.socket(socket.AF_INET) as probe:
            probe.settimeout(CONNECT_SECONDS)
            number = probe.connect_ex((other.address, port))
        return errno.errorcode[number] if number else ""


class Hosts:
    """Some hosts by their names, and the links between them."""

    def __init__(self, names: Iterable[str]) -> None:
        run = secrets.randbelow(1 << 16)
        self._hosts = {
            name: Host(name, f"fp{os.getpid()}-{run:04x}-{name}", f"10.213.{run % 250}.{number}")
            for number, name in enumerate(names, 1)
        }

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def create(self) -> None:
        """Make them, without any link.

        :raise CalledProcessError: not allowed.
        """
        for host in self._hosts.values():
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/32", "dev", "lo")
            with host.entered():
                # A new namespace may have it from this one.
                if FORWARDING.read_text() != "0\n":
                    FORWARDING.write_text("0\n")

    def remove(self) -> None:
        """Take down what there is of them; links go with their ends."""
        for host in self._hosts.values():
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True)

    def link(self, one: str, other: str) -> None:
        """Let two hosts reach each other, over a veth pair (veth(4))."""
        ends = ((self[one], self[other]), (self[other], self[one]))
        _ip(
            *("link", "add", f"to-{other}", "netns", self[one].namespace, "type", "veth"),
            *("peer", "name", f"to-{one}", "netns", self[other].namespace),
        )
        for near, far in ends:
            _ip("-n", near.namespace, "link", "set", f"to-{far.name}", "up")
            _ip(
                *("-n", near.namespace, "route", "add", f"{far.address}/32"),
                *("dev", f"to-{far.name}", "src", near.address),
            )

    def unlink(self, one: str, other: str) -> None:
        """Take a link away; connections over it never hear of their end."""
        _ip("-n", self[one].namespace, "link", "del", f"to-{other}")


@contextmanager
def hosts(names: Iterable[str], links: Iterable[tuple[str, str]]) -> Iterator[Hosts]:
    """Make hosts and links, and remove them at the end. Skips the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    made = Hosts(names)
    try:
        try:
            made.create()
            for one, other in links:
                made.link(one, other)
        except (subprocess.CalledProcessError, OSError) as problem:
            pytest.skip(f"no network namespaces here: {getattr(problem, 'stderr', None) or problem}")
        yield made
    finally:
        made.remove()


class FarpageProcess:
    """One `farpage` command that runs on a host; what it prints goes into its log."""

    def __init__(self, host: Host, name: str, log: Path, arguments: Iterable[str]) -> None:
        self.host = host
        self.name = name
        self.log_path = log
        self.arguments = tuple(arguments)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*host.launcher, sys.executable, "-W", "error", "-m", "farpage", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """Return what it has printed."""
        return self.log_path.read_text()

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of its log about an event."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    async def until_said(self, words: str) -> None:
        """Wait until its log contains some words."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while words not in self.log():
            assert self.running, f"{self.name} ended: {self.log()}"
            assert time.monotonic() < deadline, f"{self.name} never said {words!r}: {self.log()}"
            await asyncio.sleep(0.05)

    async def ended(self) -> int:
        """Wait for its end and return its exit status."""
        return await asyncio.to_thread(self._process.wait, DEADLINE_SECONDS)

    async def stop(self) -> int:
        """End it with SIGTERM and return its exit status."""
        if self.running:
            self._process.send_signal(signal.SIGTERM)
        return await self.ended()

    def kill(self) -> None:
        """Let nothing of it stay behind."""
        if self.running:
            self._process.kill()
        self._process.wait()
