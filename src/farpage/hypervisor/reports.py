"""What users are shown of clients, put together from the definition and the workers' reports. No I/O."""

from __future__ import annotations

from dataclasses import asdict

from farpage.definition.model import PAGE_BYTES, ClientRecord, Release
from farpage.hypervisor.model import (
    Attachment,
    ClientCounters,
    ClientInfo,
    FailoverInfo,
    PathInfo,
    RamTierInfo,
    ReadWay,
    ReleasedInfo,
    ReplicaInfo,
    ScrubInfo,
)
from farpage.pager.messages import ClientReport, PathReport, ReplicaReport, ScrubReport
from farpage.pager.progress import ScrubProgress
from farpage.pager.states import IN_MEMORY, STATE_NAMES

RESIDENT_STATES = tuple(STATE_NAMES[state] for state in IN_MEMORY)


def client_info(
    name: str,
    record: ClientRecord,
    *,
    attachment: Attachment,
    pid: int | None,
    worker: int | None,
    limit_bytes: int,
    qmp: str | None,
    guest_paused: bool,
    scrub_rate_bytes: int | None,
    report: ClientReport | None,
    now_seconds: float,
) -> ClientInfo:
    """Describe one client; without a report it is not paged at the moment.

    A scrub at `scrub_rate_bytes` that its worker knows nothing of is about to be begun anew.
    """
    pages = report.pages_by_state if report else {}
    return ClientInfo(
        name=name,
        attachment=attachment,
        pid=pid,
        memory_bytes=record.memory_bytes,
        limit_bytes=limit_bytes,
        resident_bytes=resident_bytes(report) if report else 0,
        ram_tier=_ram_tier(report),
        on_device_bytes=(pages.get("on_device", 0) + pages.get("reading", 0)) * PAGE_BYTES,
        zero_bytes=pages.get("zero", 0) * PAGE_BYTES,
        entitlement_bytes=record.entitlement_bytes,
        weight=record.weight,
        redundancy=record.redundancy,
        epoch=report.epoch if report else record.epoch,
        released=_released(record.released),
        fenced=report.fenced if report else "",
        worker=worker,
        stalled_faults=report.stalled_faults if report else 0,
        without_path_seconds=report.without_path_seconds if report else None,
        device_full=report.device_full if report else False,
        qmp=qmp,
        guest_paused=guest_paused,
        scrub=_scrub(report, scrub_rate_bytes, record.memory_bytes // PAGE_BYTES, now_seconds),
        counters=_counters(report),
        hedged_reads=report.hedged_reads if report else 0,
        hedges_won=report.hedges_won if report else 0,
        replicas=tuple(_replica(replica, now_seconds) for replica in report.replicas) if report else (),
        paths=tuple(_path(name, path, report, now_seconds) for path in report.paths) if report else (),
        failovers=_failovers(name, report) if report else (),
    )


def _ram_tier(report: ClientReport | None) -> RamTierInfo:
    if report is None:
        return RamTierInfo()
    tier = report.tier
    return RamTierInfo(pages=tier.pages, taken_bytes=tier.taken_bytes, stored_bytes=tier.stored_bytes)


def _released(released: Release | None) -> ReleasedInfo | None:
    if released is None:
        return None
    return ReleasedInfo(hypervisor=released.hypervisor, adopter=released.adopter, epoch=released.epoch)


def resident_bytes(report: ClientReport) -> int:
    """Return what a client has in memory."""
    return sum(report.pages_by_state[state] for state in RESIDENT_STATES) * PAGE_BYTES


def _counters(report: ClientReport | None) -> ClientCounters:
    if report is None:
        return ClientCounters()
    return ClientCounters(**{field: getattr(report.counters, field) for field in ClientCounters.model_fields})


def _scrub(
    report: ClientReport | None, rate_bytes: int | None, pages: int, now_seconds: float
) -> ScrubInfo | None:
    scrub = report.scrub if report else None
    if scrub is None and rate_bytes is not None:
        scrub = ScrubReport(**asdict(ScrubProgress(rate_bytes, pages, now_seconds)))
    if scrub is None:
        return None
    ended = now_seconds if scrub.ended_seconds is None else scrub.ended_seconds
    return ScrubInfo(
        seconds=round(max(ended - scrub.started_seconds, 0.0), 3),
        state=scrub.state,
        rate_bytes=scrub.rate_bytes,
        pages_total=scrub.pages_total,
        pages_done=scrub.pages_done,
        compared_pages=scrub.compared_pages,
        wrong_pages=scrub.wrong_pages,
        repaired_pages=scrub.repaired_pages,
        lost_pages=scrub.lost_pages,
    )


def _replica(replica: ReplicaReport, now_seconds: float) -> ReplicaInfo:
    return ReplicaInfo(
        device=replica.name,
        state=replica.health,
        reason=replica.reason,
        dirty_pages=replica.dirty_pages,
        resynced_pages=replica.resynced_pages,
        rate_bytes=round(replica.rate_bytes),
        eta_seconds=None if replica.eta_seconds is None else round(replica.eta_seconds, 1),
        since_seconds=round(max(now_seconds - replica.since_seconds, 0.0), 3),
    )


def _path(client: str, path: PathReport, report: ClientReport, now_seconds: float) -> PathInfo:
    return PathInfo(
        client=client,
        vios=path.vios,
        device=path.device,
        state=path.state,
        epoch=path.epoch,
        reason=path.reason,
        in_flight=path.in_flight,
        held=path.held,
        failovers=sum(1 for failover in report.failovers if failover.from_vios == path.vios),
        since_seconds=round(max(now_seconds - path.since_seconds, 0.0), 3),
        reads=ReadWay.DIRECT if path.direct else ReadWay.SERVED,
        direct_reads=path.direct_reads,
        direct_failures=path.direct_failures,
    )


def _failovers(client: str, report: ClientReport) -> tuple[FailoverInfo, ...]:
    return tuple(
        FailoverInfo(
            client=client,
            from_vios=failover.from_vios,
            to_vios=failover.to_vios,
            device=failover.device,
            reason=failover.reason,
            detected_at_seconds=failover.detected_at_seconds,
            active_at_seconds=failover.active_at_seconds,
            replayed_commands=failover.replayed_commands,
            quarantined_pages=failover.quarantined_bytes // PAGE_BYTES,
            longest_stall_ms=failover.longest_stall_seconds * 1e3,
        )
        for failover in report.failovers
    )
