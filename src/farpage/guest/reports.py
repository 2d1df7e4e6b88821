"""The verifier's reports: lines on the guest's serial console, parsed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

PREFIX = "farpage-guest "


@dataclass(frozen=True)
class Started:
    """The guest has booted."""

    fill_mib: int
    uptime_seconds: float


@dataclass(frozen=True)
class Filled:
    """All memory holds data of version 0."""

    pages: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """So many pages of a pass are done."""

    number: int
    pages: int
    wrong: int


@dataclass(frozen=True)
class PassDone:
    """Every word of every page was compared once."""

    number: int
    pages: int
    wrong: int
    """Pages with other contents than were written last."""
    rewritten: int
    seconds: float
    longest_stall_ms: float
    """Longest time from one page to the next, by the guest's own clock."""


@dataclass(frozen=True)
class WrongWord:
    """One of the first words that were wrong."""

    page: int
    version: int
    word: int
    expected: str
    found: str


@dataclass(frozen=True)
class CommandDone:
    """A command of a shell guest ended; `status` as a shell has it in `$?`."""

    number: int
    status: int


@dataclass(frozen=True)
class Failed:
    """The guest cannot do its work."""

    cause: str


@dataclass(frozen=True)
class Ended:
    """All passes or commands are done, the guest powers off."""

    wrong: int


Report: TypeAlias = Started | Filled | Progress | PassDone | WrongWord | CommandDone | Failed | Ended


def _started(fields: dict[str, str]) -> Report:
    return Started(int(fields["fill_mib"]), float(fields["uptime_seconds"]))


def _filled(fields: dict[str, str]) -> Report:
    return Filled(int(fields["pages"]), float(fields["seconds"]))


def _progress(fields: dict[str, str]) -> Report:
    return Progress(int(fields["pass"]), int(fields["pages"]), int(fields["wrong"]))


def _pass_done(fields: dict[str, str]) -> Report:
    return PassDone(
        number=int(fields["pass"]),
        pages=int(fields["pages"]),
        wrong=int(fields["wrong"]),
        rewritten=int(fields["rewritten"]),
        seconds=float(fields["seconds"]),
        longest_stall_ms=float(fields["longest_stall_ms"]),
    )


def _wrong_word(fields: dict[str, str]) -> Report:
    return WrongWord(
        page=int(fields["page"]),
        version=int(fields["version"]),
        word=int(fields["word"]),
        expected=fields["expected"],
        found=fields["found"],
    )


def _command_done(fields: dict[str, str]) -> Report:
    return CommandDone(int(fields["command"]), int(fields["status"]))


_PARSERS: dict[str, Callable[[dict[str, str]], Report]] = {
    "start": _started,
    "fill": _filled,
    "progress": _progress,
    "pass": _pass_done,
    "wrong": _wrong_word,
    "command": _command_done,
    "failed": lambda fields: Failed(fields["cause"]),
    "end": lambda fields: Ended(int(fields["wrong"])),
}


def parse_report(line: str) -> Report | None:
    """Return the report in a line of the console; None when there is none, or a damaged one."""
    _, found, text = line.partition(PREFIX)
    words = text.split()
    if not found or not words:
        return None
    parser = _PARSERS.get(words[0].partition("=")[0])
    fields = dict(word.split("=", 1) for word in words if "=" in word)
    try:
        return parser(fields) if parser else None
    except (KeyError, ValueError):
        return None
