"""A network namespace behind one link, which can be cut; needs root and ip(8)."""

from __future__ import annotations

import os
import subprocess


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class NamespaceLink:
    """A namespace with a veth pair (veth(4)) to it; names and addresses are this process's own."""

    def __init__(self) -> None:
        pid = os.getpid()
        subnet = f"10.213.{pid % 250}"
        self.name = f"fp{pid}"
        self.near_address = f"{subnet}.1"
        self.far_address = f"{subnet}.2"
        self._near, self._far = f"fpn{pid}", f"fpf{pid}"

    @property
    def launcher(self) -> tuple[str, ...]:
        """What a command in the namespace is started by."""
        return ("nsenter", f"--net=/run/netns/{self.name}", "--")

    def create(self) -> None:
        """Make the namespace and its link.

        :raise CalledProcessError: not allowed.
        """
        _ip("netns", "add", self.name)
        _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.name)
        _ip("addr", "add", f"{self.near_address}/24", "dev", self._near)
        _ip("link", "set", self._near, "up")
        _ip("-n", self.name, "addr", "add", f"{self.far_address}/24", "dev", self._far)
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "link", "set", self._far, "up")

    def cut(self) -> None:
        """Let nothing through from now on; connections stay as they are."""
        _ip("-n", self.name, "link", "set", self._far, "down")

    def mend(self) -> None:
        """Let everything through again."""
        _ip("-n", self.name, "link", "set", self._far, "up")

    def remove(self) -> None:
        """Take it all down."""
        subprocess.run(["ip", "link", "del", self._near], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "netns", "del", self.name], check=False)
