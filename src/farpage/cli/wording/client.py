"""Words for clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from farpage.cli.output import fields, table
from farpage.cli.wording.path import overview as paths_overview
from farpage.definition.model import PAGE_BYTES
from farpage.terminal.sizes import format_duration, format_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from farpage.hypervisor.model import ClientInfo, FailoverInfo, ReplicaInfo, ScrubInfo


def created(info: ClientInfo) -> str:
    """Say that the client is there, and what it is for."""
    return (
        f"client {info.name} created: {format_size(info.memory_bytes)}, redundancy {info.redundancy}; "
        f"attach its memory with 'farpage client attach {info.name} --pid PID'"
    )


def attached(info: ClientInfo) -> str:
    """Say what is paged now."""
    return (
        f"client {info.name} attached: {format_size(info.memory_bytes)} of process {info.pid}, "
        f"limited to {format_size(info.limit_bytes)}"
    )


def detached(info: ClientInfo) -> str:
    """Say that the memory is the process's own again."""
    return f"client {info.name} detached: all of its memory is resident again"


def released(info: ClientInfo) -> str:
    """Say that the client is nobody's, and what can be done with it."""
    return (
        f"client {info.name} released: all of its pages are on its devices; adopt it at another hypervisor "
        f"with 'farpage client adopt {info.name}', and end its process here"
    )


def adopted(info: ClientInfo) -> str:
    """Say that the client can be attached here."""
    return (
        f"client {info.name} adopted at epoch {info.epoch}: attach {format_size(info.memory_bytes)} of "
        f"memory with 'farpage client attach {info.name} --pid PID', and it goes on with all of its pages"
    )


def scrubbed(info: ClientInfo) -> str:
    """Say how a scrub stands."""
    if info.scrub is None:
        return f"client {info.name}: its pager ended, and the scrub with it; start it again"
    return f"client {info.name}: scrub {_scrub(info.scrub)}"


def scrub_stopped(info: ClientInfo) -> str:
    """Say how the scrub stands that was to be ended, if there was one."""
    return scrubbed(info) if info.scrub else f"client {info.name}: no scrub runs"


def _scrub(scrub: ScrubInfo) -> str:
    share = 100 if not scrub.pages_total else 100 * scrub.pages_done // scrub.pages_total
    done = f"{scrub.state} after {format_duration(scrub.seconds)}, {share}%"
    return (
        f"{done}: {scrub.compared_pages} pages compared, {scrub.wrong_pages} wrong, "
        f"{scrub.repaired_pages} repaired, {scrub.lost_pages} lost"
    )


def overview(clients: Sequence[ClientInfo]) -> Table:
    """Return one line per client."""
    return table(
        ["client", "attached", "memory", "limit", "resident", "on device", "page-ins", "page-outs", "path"],
        (
            (
                info.name,
                _attachment(info),
                format_size(info.memory_bytes),
                format_size(info.limit_bytes),
                format_size(info.resident_bytes),
                format_size(info.on_device_bytes),
                str(info.counters.page_in_pages),
                str(info.counters.page_out_pages),
                _paths(info),
            )
            for info in clients
        ),
    )


def _ram_tier(info: ClientInfo) -> str:
    tier = info.ram_tier
    if not tier.pages:
        return format_size(0)
    ratio = tier.pages * PAGE_BYTES / tier.taken_bytes
    return f"{format_size(tier.taken_bytes)} for {tier.pages} pages, {ratio:.1f} times as large"


def _paths(info: ClientInfo) -> str:
    if info.fenced:
        return f"fenced: {info.fenced}"
    return ", ".join(f"{path.vios} {path.state}" for path in info.paths) or "none"


def details(info: ClientInfo) -> Iterator[RenderableType]:
    """Return everything about one client."""
    counters = info.counters
    yield fields(
        [
            ("client", info.name),
            ("attached", _attachment(info)),
            ("memory", format_size(info.memory_bytes)),
            ("limit", format_size(info.limit_bytes)),
            ("entitlement", format_size(info.entitlement_bytes)),
            ("weight", str(info.weight)),
            ("resident", format_size(info.resident_bytes)),
            ("RAM tier", _ram_tier(info)),
            ("on device", format_size(info.on_device_bytes)),
            ("zero", format_size(info.zero_bytes)),
            ("redundancy", str(info.redundancy)),
            ("epoch", str(info.epoch)),
            *([("fenced", info.fenced)] if info.fenced else []),
            ("worker", "-" if info.worker is None else str(info.worker)),
            ("stalled faults", str(info.stalled_faults)),
            ("volume", _volume(info)),
            ("scrub", _scrub(info.scrub) if info.scrub else "-"),
            ("longest stall", format_duration(counters.longest_stall_ms / 1000)),
        ]
    )
    yield ""
    yield table(
        ["counter", "value"],
        [
            (name.removesuffix("_pages").replace("_", " "), f"{value}")
            for name, value in counters.model_dump(
                exclude={"longest_stall_ms", "wrong_by_device", "repaired_by_device"}
            ).items()
        ],
    )
    if counters.wrong_by_device:
        yield ""
        yield table(
            ["device", "wrong pages", "repaired"],
            (
                (device, str(wrong), str(counters.repaired_by_device.get(device, 0)))
                for device, wrong in sorted(counters.wrong_by_device.items())
            ),
        )
    if len(info.replicas) > 1:
        yield ""
        yield _replicas(info.replicas)
    yield ""
    yield paths_overview(info.paths)
    if info.failovers:
        yield ""
        yield _failovers(info.failovers)


def _replicas(replicas: Sequence[ReplicaInfo]) -> Table:
    return table(
        ["replica on", "state", "for", "missing", "copied", "rate", "left", "reason"],
        (
            (
                replica.device,
                str(replica.state),
                format_duration(replica.since_seconds),
                str(replica.dirty_pages),
                str(replica.resynced_pages),
                f"{format_size(int(replica.rate_bytes))}/s" if replica.rate_bytes else "-",
                "-" if replica.eta_seconds is None else format_duration(replica.eta_seconds),
                replica.reason or "-",
            )
            for replica in replicas
        ),
    )


def _volume(info: ClientInfo) -> str:
    if info.without_path_seconds is not None:
        paused = "; the guest is paused" if info.guest_paused else ""
        return f"no path for {format_duration(info.without_path_seconds)}{paused}"
    return "its device is full" if info.device_full else "served"


def _failovers(failovers: Sequence[FailoverInfo]) -> Table:
    return table(
        ["failover from", "to", "took", "longest stall", "replayed", "quarantined", "reason"],
        (
            (
                failover.from_vios,
                failover.to_vios or "-",
                "-"
                if failover.active_at_seconds is None
                else format_duration(failover.active_at_seconds - failover.detected_at_seconds),
                format_duration(failover.longest_stall_ms / 1000),
                str(failover.replayed_commands),
                str(failover.quarantined_pages),
                failover.reason,
            )
            for failover in failovers
        ),
    )


def _attachment(info: ClientInfo) -> str:
    if info.released:
        return f"adopted by {info.released.adopter}" if info.released.adopter else "released"
    return str(info.attachment) if info.pid is None else f"{info.attachment} {info.pid}"
