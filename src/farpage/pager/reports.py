"""How a client is paged at the moment, put together for the control process. No I/O."""

from __future__ import annotations

from dataclasses import asdict

from farpage.pager.client import PagedClient
from farpage.pager.messages import (
    ClientReport,
    CounterReport,
    FailoverReport,
    PathReport,
    ReplicaReport,
    ScrubReport,
    TierReport,
)
from farpage.pager.states import STATE_NAMES


def report_of(client: str, paged: PagedClient) -> ClientReport:
    """Say how a client is."""
    space = paged.space
    space.settle()
    return ClientReport(
        client=client,
        pages_by_state=dict(zip(STATE_NAMES, space.table.counts, strict=True)),
        limit_pages=space.limit.pages,
        tier=TierReport(
            pages=len(space.tier), taken_bytes=space.tier.taken_bytes, stored_bytes=space.tier.stored_bytes
        ),
        epoch=space.volume.epoch,
        fenced=space.volume.ownership.fenced,
        stalled_faults=paged.faults.stalled,
        without_path_seconds=paged.outage.without_path_seconds,
        device_full=space.full,
        page_outs_wait=space.page_outs_wait,
        scrub=ScrubReport(**asdict(paged.scrub.progress)) if paged.scrub else None,
        counters=CounterReport(**asdict(space.counters)),
        replicas=tuple(ReplicaReport(**asdict(replica)) for replica in space.volume.replica_status()),
        hedged_reads=space.volume.counts.hedged_reads,
        hedges_won=space.volume.counts.hedges_won,
        paths=tuple(
            PathReport(
                vios=path.endpoint.vios,
                device=path.endpoint.device,
                state=path.state,
                reason=path.reason,
                epoch=path.epoch,
                in_flight=path.in_flight,
                held=path.held,
                losses=path.losses,
                since_seconds=path.since_seconds,
                direct=path.direct,
                direct_reads=path.direct_reads,
                direct_failures=path.direct_failures,
            )
            for path in space.volume.status()
        ),
        failovers=tuple(FailoverReport(**asdict(record)) for record in space.volume.failovers.records),
    )
