"""Colours of what users see."""

from __future__ import annotations

from typing import Final

from rich.text import Text

_PATH_STATES: Final = {"active": "green", "standby": "cyan", "suspect": "yellow", "failed": "red"}


def path_state(state: str) -> Text:
    """Return a path's state in its colour."""
    return Text(state, style=_PATH_STATES.get(state, ""))
