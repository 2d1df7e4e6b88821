"""The state folder of a set: where its sockets, records and logs are, and the description in `set.json`.

    STATE/set.json                          names and addresses; what other commands find the set by
    STATE/lock, set.sock                    held, and listened at, by the process that runs the set
    STATE/vios/NAME/control.sock, data.sock, vios.db, log
    STATE/hypervisor/control.sock, attach.sock, log
    STATE/devices/common/                   the paging device that every VIOS reaches, unless others are named

Daemons that run on their own (systemd, another machine) make a set too: write their addresses into a
`set.json`, and every command works with it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farpage.address import parse_address
from farpage.definition.model import Name
from farpage.errors import ExitStatus, FarpageError, InvalidInput

STATE_VARIABLE = "FARPAGE_STATE"


@dataclass(eq=False)
class NoSet(FarpageError):
    """A state folder describes no set."""

    code = "no_set"
    template = "{folder} describes no farpage set ({cause_text})"
    remedy = (
        "start one with 'farpage up --state {folder}', or name another folder with --state or FARPAGE_STATE"
    )
    exit_status = ExitStatus.UNREACHABLE
    folder: str
    cause_text: str


@dataclass(eq=False)
class NoSuchVios(FarpageError):
    """The set has no VIOS of this name."""

    code = "no_such_vios"
    template = "the set has no VIOS {vios!r}"
    remedy = "use one of: {known}"
    exit_status = ExitStatus.NOT_FOUND
    vios: str
    known: str


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class SetVios(_Document):
    """Where a VIOS answers."""

    control: str
    data: tuple[str, ...] = Field(min_length=1)


class SetHypervisor(_Document):
    """Where the hypervisor answers; `attach` is the socket that regions connect to."""

    name: Name
    control: str
    attach: str


class SetDocument(_Document):
    """`set.json`: the daemons of a set and their addresses."""

    format: Literal[1] = 1
    hypervisor: SetHypervisor
    vioses: dict[Name, SetVios]
    tls: Path | None = None
    """Folder of the certificates for addresses that are TCP ports."""

    def vios(self, name: str) -> SetVios:
        """Return the VIOS of this name.

        :raise NoSuchVios:
        """
        found = self.vioses.get(name)
        if found is None:
            raise NoSuchVios(name, ", ".join(self.vioses) or "(there is none)")
        return found


def default_state_dir() -> Path:
    """Return the folder used when none is named.

    FARPAGE_STATE, else /var/lib/farpage for root, else `farpage` in XDG_STATE_HOME (or ~/.local/state).
    """
    if named := os.environ.get(STATE_VARIABLE):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/farpage")
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "farpage"


@contextlib.contextmanager
def _refused_as_input() -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise InvalidInput(
            "state folder", f"{problem.filename}: {problem.strerror}", "name a folder that you can write to"
        ) from problem


@dataclass(frozen=True)
class StateLayout:
    """The paths of one state folder; `root` is absolute."""

    root: Path

    @classmethod
    def at(cls, folder: Path) -> StateLayout:
        """Return the layout of `folder`, which need not exist."""
        return cls(folder.expanduser().absolute())

    @property
    def document(self) -> Path:
        """The set's description."""
        return self.root / "set.json"

    @property
    def lock(self) -> Path:
        """Locked by the process that runs the set."""
        return self.root / "lock"

    @property
    def control(self) -> str:
        """Control address of the process that runs the set."""
        return self._socket(self.root / "set.sock")

    @property
    def common_device(self) -> Path:
        """Folder of the paging device that all VIOSes reach."""
        return self.root / "devices" / "common"

    @property
    def hypervisor_dir(self) -> Path:
        """State of the hypervisor."""
        return self.root / "hypervisor"

    def vios_dir(self, name: str) -> Path:
        """State of one VIOS."""
        return self.root / "vios" / name

    def describe(self, vios_names: tuple[str, ...]) -> SetDocument:
        """Return the description of an embedded set of these VIOSes and one hypervisor.

        :raise InvalidInput: the folder's path is too long for UNIX sockets.
        """
        return SetDocument(
            hypervisor=SetHypervisor(
                name="hypervisor",
                control=self._socket(self.hypervisor_dir / "control.sock"),
                attach=self._socket(self.hypervisor_dir / "attach.sock"),
            ),
            vioses={
                name: SetVios(
                    control=self._socket(self.vios_dir(name) / "control.sock"),
                    data=(self._socket(self.vios_dir(name) / "data.sock"),),
                )
                for name in vios_names
            },
        )

    def create_root(self) -> None:
        """Make the state folder itself, only for this user.

        :raise InvalidInput: it cannot be made.
        """
        with _refused_as_input():
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, document: SetDocument) -> None:
        """Make the daemons' folders and write `set.json`.

        :raise InvalidInput: they cannot be made.
        """
        with _refused_as_input():
            for folder in (self.hypervisor_dir, *map(self.vios_dir, document.vioses)):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh = self.document.with_suffix(".new")
            fresh.write_text(document.model_dump_json(indent=2) + "\n")
            fresh.replace(self.document)

    def read(self) -> SetDocument:
        """Read `set.json`.

        :raise NoSet: there is none, or it cannot be read.
        :raise InvalidInput: it is not a set's description.
        """
        try:
            text = self.document.read_bytes()
        except OSError as problem:
            raise NoSet(str(self.root), (problem.strerror or "unreadable").lower()) from problem
        try:
            return SetDocument.model_validate_json(text)
        except ValidationError as problem:
            first = problem.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise InvalidInput(
                str(self.document),
                f"{where}: {first['msg']}",
                "write it anew with 'farpage up', or correct it",
            ) from problem

    @staticmethod
    def _socket(path: Path) -> str:
        return str(parse_address(f"unix:{path}", field="state folder"))
