"""Documents of what is asked of a whole set."""

from __future__ import annotations

import enum

from pydantic import BaseModel, ConfigDict, Field

from farpage.definition.model import Name


class ViosStarted(BaseModel):
    """`POST /v1/vioses/{name}/start`."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    vios: Name
    pid: int
    was_running: bool


class CopyState(enum.StrEnum):
    """How a copy of the definition compares with the newest one that is known."""

    NEWEST = "newest"
    LAGS = "lags"
    CONTRADICTS = "contradicts"
    UNKNOWN = "unknown"
    """Its holder does not answer."""


class CopyInfo(BaseModel):
    """One copy of the definition; `differences` says what changes from it to the newest one."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    holder: str
    state: CopyState
    problem: str = ""
    revision: int | None = None
    epochs: dict[Name, int] = Field(default_factory=dict)
    differences: tuple[str, ...] = ()


class DefinitionVerification(BaseModel):
    """What `farpage definition verify` finds; `sound` when there is nothing to be done."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    sound: bool
    revision: int | None
    copies: tuple[CopyInfo, ...]
    unmet_wishes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
