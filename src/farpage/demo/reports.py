"""What a guest tells of its work, one line for each thing done."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class PassReport(BaseModel):
    """A pass over all pages: each read and compared with what was last written, a quarter written anew.

    `longest_gap_ms` is the longest time between two accesses, where the guest has a clock to tell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pages_verified: int
    pages_wrong: int
    seconds: float
    longest_gap_ms: float | None = None


class FillReport(BaseModel):
    """All pages have been written once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pages: int
    seconds: float
