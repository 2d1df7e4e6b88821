"""Documents that every control API answers with."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ErrorBody(BaseModel):
    """What went wrong: see `farpage.errors.FarpageError.as_document`.

    `details` holds the error's attributes that are numbers, truth values or text, for programs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    code: str
    message: str
    remedy: str
    details: dict[str, bool | int | float | str] = Field(default_factory=dict)


class ErrorAnswer(BaseModel):
    """Body of every answer with a status of 400 or above."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    error: ErrorBody
