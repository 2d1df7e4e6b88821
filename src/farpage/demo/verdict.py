"""What the demo found out, and whether that is good enough. No I/O."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict

from farpage.demo.scenario import PASSES_AFTER, RESIDENT_TOLERANCE, Passes
from farpage.hypervisor.model import FailoverInfo


class Verdict(enum.StrEnum):
    """The demo in one word."""

    OK = "ok"
    FAILED = "failed"


class FaultKind(enum.StrEnum):
    """How a VIOS was made to fail."""

    SIGKILL = "sigkill"
    SIGSTOP = "sigstop"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fault(_Document):
    """A fault that the demo caused; the time is CLOCK_MONOTONIC from right before the signal."""

    kind: FaultKind
    vios: str
    at_seconds: float


class Failover(_Document):
    """What a fault led to, as the hypervisor's worker saw it.

    `guest_longest_gap_ms` is the guest's own view, where it has a clock to tell: the longest time between two
    accesses to its pages in the passes that the fault fell into.
    """

    kind: FaultKind
    vios: str
    detected_ms: float
    longest_stall_ms: float
    guest_longest_gap_ms: float | None
    replayed_commands: int
    quarantined_pages: int


class PassCounts(_Document):
    """Passes of the guest over all its pages, while its memory was paged."""

    before: int
    during: int
    after: int


class DemoResult(_Document):
    """The demo's `--json` document."""

    guest: str
    pages_total: int
    """Pages that the guest fills and checks in each pass."""
    pages_verified: int
    """Checks of a page that found what the guest had written, over all passes."""
    pages_wrong: int
    page_ins: int
    page_outs: int
    limit_bytes: int
    resident_bytes_max: int
    """Most memory that the guest had resident after the limit was first reached, as its memfd tells."""
    passes: PassCounts
    failovers: tuple[Failover, ...]
    paths: dict[str, str]
    """State of the path over each VIOS at the end."""
    seconds: float
    verdict: Verdict
    problems: tuple[str, ...]
    """Why the verdict is not `ok`."""


def match_failovers(
    faults: Sequence[Fault], seen: Sequence[FailoverInfo], gaps_ms: Sequence[float | None]
) -> tuple[Failover, ...]:
    """Find for each fault the first failover that followed it; a fault without one is left out."""
    found = []
    for fault, gap_ms in zip(faults, gaps_ms, strict=True):
        followed = [
            info
            for info in seen
            if info.from_vios == fault.vios and info.detected_at_seconds >= fault.at_seconds
        ]
        if followed:
            info = min(followed, key=lambda one: one.detected_at_seconds)
            found.append(
                Failover(
                    kind=fault.kind,
                    vios=fault.vios,
                    detected_ms=round((info.detected_at_seconds - fault.at_seconds) * 1000, 1),
                    longest_stall_ms=round(info.longest_stall_ms, 1),
                    guest_longest_gap_ms=None if gap_ms is None else round(gap_ms, 1),
                    replayed_commands=info.replayed_commands,
                    quarantined_pages=info.quarantined_pages,
                )
            )
    return tuple(found)


def find_problems(
    *,
    pages_verified: int,
    pages_wrong: int,
    resident_bytes_max: int,
    limit_bytes: int,
    passes: Passes,
    failovers: Sequence[Failover],
) -> Iterator[str]:
    """Yield a sentence for everything that keeps the verdict from being `ok`."""
    if pages_wrong:
        yield f"the guest found {pages_wrong} wrong pages"
    if not pages_verified:
        yield "the guest verified nothing"
    if passes.before < 1:
        yield "the guest made no full pass between the limit and the first fault"
    if passes.after < PASSES_AFTER:
        yield f"the guest made {passes.after} full passes after the last fault, not {PASSES_AFTER}"
    if resident_bytes_max <= 0:
        yield "the limit was never reached"
    if resident_bytes_max > limit_bytes * RESIDENT_TOLERANCE:
        yield f"{resident_bytes_max} bytes were resident, more than 5% above the limit of {limit_bytes}"
    for kind in FaultKind:
        if kind not in {failover.kind for failover in failovers}:
            yield f"no failover followed the {kind.upper()}"
