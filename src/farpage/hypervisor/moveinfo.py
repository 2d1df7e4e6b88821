"""What users see of a move, put together from the definition and what the target's VIOS says. No I/O."""

from __future__ import annotations

from typing import Final

from farpage.definition.model import PAGE_BYTES, Move, MoveState
from farpage.hypervisor.movement import IntermediaryInfo, MoveInfo, MoveKind, MoveStage
from farpage.vios.model import CopyStatus

SEEN_SECONDS: Final = 2.0
"""An intermediate client that has not reported for so long is away."""


def is_seen(status: CopyStatus | None, move: Move) -> bool:
    """Tell whether the move's intermediate client is at work."""
    if status is None or status.intermediary is None or status.seen_seconds_ago is None:
        return False
    return status.intermediary.principal == move.principal and status.seen_seconds_ago < SEEN_SECONDS


def move_info(client: str, move: Move, status: CopyStatus | None, *, problem: str) -> MoveInfo:
    """Describe a move by an intermediate client; devices by their identifiers.

    `problem` is what keeps the hypervisor from going on with it.
    """
    report = status.intermediary if status else None
    paused = move.paused and move.state is not MoveState.RETIRING
    copying = move.state is MoveState.COPYING and not paused and is_seen(status, move)
    rate = float(report.rate_bytes) if report and copying else 0.0
    info = MoveInfo(
        client=client,
        kind=MoveKind.INDIRECT,
        source=move.source,
        target=move.target,
        source_vios=move.source_vios,
        target_vios=move.target_vios,
        stage=MoveStage.PAUSED if paused else MoveStage(move.state.value),
        problem=problem or (report.problem if report else ""),
        paused=move.paused,
        bandwidth_bytes=move.bandwidth_bytes,
        rate_bytes=rate,
        intermediary=IntermediaryInfo(
            running_here=False,
            seen_seconds_ago=status.seen_seconds_ago if status else None,
            relay=report.relay if report else "",
            connected=bool(status and status.relay_connected),
            problem=report.problem if report else "",
        ),
    )
    if status is None:
        return info
    missing_bytes = (status.total_pages - status.present_pages) * PAGE_BYTES
    return info.model_copy(
        update={
            "total_pages": status.total_pages,
            "present_pages": status.present_pages,
            "eta_seconds": round(missing_bytes / rate, 1) if rate else None,
            "waiting_commands": status.waiting_commands,
            "relayed_reads": status.relayed_reads,
            "kept_pages": status.kept_pages,
            "filled_pages": status.filled_pages,
        }
    )
