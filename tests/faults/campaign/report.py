"""What a campaign found: which fault made the clients wait for how long, and what must never be. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from tests.faults.campaign.busy import Stall, WrongPage
from tests.faults.campaign.schedule import Kind


@dataclass
class Injected:
    """A fault as it was; times are CLOCK_MONOTONIC."""

    kind: Kind
    target: str
    alone: bool
    hold_seconds: float
    begin_seconds: float
    end_seconds: float = math.inf
    """When the set was whole again."""
    restarted_seconds: float | None = None
    """When the process that clients wait for was started again."""

    def delayed(self, stall: Stall) -> bool:
        """Tell whether an access waited while this fault was in force."""
        return stall.begin_seconds < self.end_seconds and stall.end_seconds > self.begin_seconds


@dataclass(frozen=True)
class StallsOfKind:
    """How long the longest access waited at each fault of a kind that came alone; milliseconds."""

    kind: Kind
    injected: int
    alone: int
    felt_ms: tuple[float, ...]
    """One for each fault alone that made an access wait long enough to be told of."""
    p50_ms: float
    p99_ms: float
    longest_ms: float
    longest_hold_ms: float


@dataclass
class Outcome:
    """Everything that a campaign has found out."""

    seconds: float
    path_timeout_seconds: float = 1.0
    reads: int = 0
    writes: int = 0
    faults: list[Injected] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    wrong: list[WrongPage] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    damaged_pages: int = 0
    repaired_pages: int = 0
    """By scrubs; the others of the damaged ones were read or written before."""

    @property
    def failed(self) -> bool:
        """Whether anything happened that must never."""
        return bool(self.wrong or self.hangs or self.leaks)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not exceed; 0 when there are none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def stalls_during(fault: Injected, stalls: Iterable[Stall]) -> list[Stall]:
    """Return the stalls that lasted while a fault was in force."""
    return [stall for stall in stalls if fault.delayed(stall)]


def longest_stall(fault: Injected, stalls: Iterable[Stall]) -> float:
    """Return the longest stall in seconds that lasted while a fault was in force; 0 when none did."""
    return max((stall.seconds for stall in stalls_during(fault, stalls)), default=0.0)


def longest_stalls(fault: Injected, stalls: Iterable[Stall]) -> str:
    """Say how long each client waited at a fault, the longest first, and from when on."""

    def after_ms(stall: Stall) -> float:
        return (stall.begin_seconds - fault.begin_seconds) * 1e3

    longest: dict[str, Stall] = {}
    for stall in stalls_during(fault, stalls):
        if stall.client not in longest or stall.seconds > longest[stall.client].seconds:
            longest[stall.client] = stall
    return ", ".join(
        f"{found.client} {found.seconds * 1e3:.0f} ms at {after_ms(found):+.0f} ms"
        for found in sorted(longest.values(), key=lambda found: -found.seconds)
    )


def stalls_by_kind(faults: Sequence[Injected], stalls: Sequence[Stall]) -> list[StallsOfKind]:
    """Sum up the faults of each kind, in the order of `Kind`."""
    order = list(Kind)
    rows: list[StallsOfKind] = []
    for kind, grouped in groupby(sorted(faults, key=lambda fault: order.index(fault.kind)), lambda f: f.kind):
        those = list(grouped)
        alone = [fault for fault in those if fault.alone]
        felt = [ms for fault in alone if (ms := longest_stall(fault, stalls) * 1e3) > 0]
        rows.append(
            StallsOfKind(
                kind=kind,
                injected=len(those),
                alone=len(alone),
                felt_ms=tuple(felt),
                p50_ms=percentile(felt, 0.5),
                p99_ms=percentile(felt, 0.99),
                longest_ms=max(felt, default=0.0),
                longest_hold_ms=max((fault.hold_seconds for fault in alone), default=0.0) * 1e3,
            )
        )
    return rows


def longest_together(faults: Sequence[Injected], stalls: Sequence[Stall]) -> float:
    """Return the longest stall in seconds while several faults were in force."""
    return max((longest_stall(fault, stalls) for fault in faults if not fault.alone), default=0.0)


def longest_without(faults: Sequence[Injected], stalls: Sequence[Stall]) -> float:
    """Return the longest stall in seconds while the set was whole: the machine's own doing."""
    quiet = (stall.seconds for stall in stalls if not any(fault.delayed(stall) for fault in faults))
    return max(quiet, default=0.0)


def restart_to_served(faults: Sequence[Injected], stalls: Sequence[Stall]) -> list[float]:
    """Return the seconds from each restart until the first access that had waited for it was served."""
    served: list[float] = []
    for fault in faults:
        restarted = fault.restarted_seconds
        if restarted is None or not fault.alone:
            continue
        ends = [
            stall.end_seconds
            for stall in stalls
            if stall.begin_seconds < restarted < stall.end_seconds <= fault.end_seconds
        ]
        if ends:
            served.append(min(ends) - restarted)
    return served


@dataclass(frozen=True)
class Bound:
    """What the longest stalls at faults of a kind may be on a machine without other work."""

    share: float
    """Of the faults; 1 for all of them."""
    most_ms: float

    def text(self) -> str:
        """Return it as the table has it."""
        return f"{'max' if self.share == 1 else f'p{self.share * 100:.0f}'} at most {self.most_ms:.0f}"

    def verdict(self, found_ms: Sequence[float]) -> str:
        """Say whether it was kept."""
        if not found_ms:
            return "not felt"
        return "reached" if percentile(found_ms, self.share) <= self.most_ms else "missed"


RESTART = Bound(1, 500)
"""From a hypervisor's restart to the first page served."""


def bounds(path_timeout_seconds: float) -> dict[Kind, Bound]:
    """Return the bounds of the kinds that have one."""
    return {
        Kind.VIOS_KILL: Bound(0.99, 100),
        Kind.VIOS_STOP: Bound(1, path_timeout_seconds * 1e3 + 100),
        Kind.WORKER_KILL: Bound(1, 1500),
        Kind.HYPERVISOR_KILL: Bound(1, 3000),
        Kind.HOST_KILL: Bound(1, 3000),
    }


def describe(outcome: Outcome) -> str:
    """Return the report as Markdown."""
    faults, stalls = outcome.faults, outcome.stalls
    kept = bounds(outcome.path_timeout_seconds)
    lines = [
        f"{outcome.seconds:.0f} s, {len(faults)} faults, {outcome.reads} pages verified, "
        f"{outcome.writes} written. Longest stall at each fault that came alone and was felt, in ms:",
        "",
        "| kind | faults | alone | felt | p50 | p99 | max | longest hold | bound | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in stalls_by_kind(faults, stalls):
        bound = kept.get(row.kind)
        wanted, verdict = (bound.text(), bound.verdict(row.felt_ms)) if bound else ("", "")
        lines.append(
            f"| `{row.kind}` | {row.injected} | {row.alone} | {len(row.felt_ms)} | {row.p50_ms:.0f} | "
            f"{row.p99_ms:.0f} | {row.longest_ms:.0f} | {row.longest_hold_ms:.0f} | {wanted} | {verdict} |"
        )
    served = [seconds * 1e3 for seconds in restart_to_served(faults, stalls)]
    lines.append(
        f"| from a restart to the first page | | | {len(served)} | {percentile(served, 0.5):.0f} | "
        f"{percentile(served, 0.99):.0f} | {max(served, default=0.0):.0f} | | {RESTART.text()} | "
        f"{RESTART.verdict(served)} |"
    )
    lines += [
        "",
        f"- longest stall while several faults lasted: {longest_together(faults, stalls):.2f} s",
        f"- longest stall while nothing was wrong: {longest_without(faults, stalls) * 1e3:.0f} ms",
        f"- damaged pages: {outcome.damaged_pages}, of them repaired by scrubs: {outcome.repaired_pages}",
        f"- wrong pages: {len(outcome.wrong)}",
        *(f"  - {wrong.client}: {wrong.text}" for wrong in outcome.wrong[:20]),
        f"- hangs: {len(outcome.hangs)}",
        *(f"  - {hang}" for hang in outcome.hangs),
        f"- leaks: {len(outcome.leaks)}",
        *(f"  - {leak}" for leak in outcome.leaks),
    ]
    return "\n".join(lines)
