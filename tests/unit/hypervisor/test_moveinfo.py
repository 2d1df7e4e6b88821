from __future__ import annotations

from pathlib import Path

import pytest

from farpage.definition import moving
from farpage.definition.errors import NoDeviceFits
from farpage.definition.model import Definition, Move, MoveState
from farpage.hypervisor.evacuating import best_device
from farpage.hypervisor.intermediaries import Intermediaries
from farpage.hypervisor.moveinfo import is_seen, move_info
from farpage.hypervisor.movement import MoveStage
from farpage.vios.model import CopyStatus, IntermediaryReport
from farpage.volume.resolve import Viewpoint
from tests.unit.volume.test_resolve import FIRST, GIB, IN_SYNC, SECOND, THIRD, definition

PRINCIPAL = "00000000000000cc"


def begun(*tcp: str) -> tuple[Definition, Move]:
    route = moving.Route(SECOND, "vios3", FIRST, "vios1")
    moved = moving.begin(definition((SECOND, IN_SYNC), tcp=tcp), "vm1", moving.Claim("", 0), route, PRINCIPAL)
    return moved, moved.moves["vm1"]


def status(*, seen: float | None = 0.3, principal: str = PRINCIPAL, problem: str = "") -> CopyStatus:
    return CopyStatus(
        principal=PRINCIPAL,
        present_pages=25,
        total_pages=100,
        relay_connected=True,
        intermediary=IntermediaryReport(
            principal=principal,
            relay="unix:/r",
            read_bytes=0,
            written_bytes=0,
            rate_bytes=4096,
            problem=problem,
        ),
        seen_seconds_ago=seen,
        waiting_commands=1,
        relayed_reads=2,
        kept_pages=3,
        filled_pages=4,
    )


def test_an_intermediate_client_is_at_work_while_its_own_reports_come() -> None:
    _, move = begun()
    assert is_seen(status(), move)
    for away in (None, status(seen=None), status(seen=2.5), status(principal="00000000000000dd")):
        assert not is_seen(away, move)


def test_progress_has_a_time_left_while_pages_are_copied() -> None:
    _, move = begun()
    info = move_info("vm1", move, status(), problem="")
    assert (info.stage, info.present_pages, info.eta_seconds) == (MoveStage.COPYING, 25, 75.0)
    paused = move_info("vm1", move.model_copy(update={"paused": True}), status(), problem="")
    assert (paused.stage, paused.rate_bytes, paused.eta_seconds) == (MoveStage.PAUSED, 0.0, None)
    retiring = move.model_copy(update={"paused": True, "state": MoveState.RETIRING})
    assert move_info("vm1", retiring, status(), problem="").stage is MoveStage.RETIRING
    assert move_info("vm1", move, None, problem="").total_pages == 0


def test_what_keeps_it_from_going_on_is_said() -> None:
    _, move = begun()
    assert move_info("vm1", move, status(problem="its own"), problem="").problem == "its own"
    assert move_info("vm1", move, status(problem="its own"), problem="ours").problem == "ours"


@pytest.mark.parametrize(
    ("tcp", "words"),
    [
        (
            ("vios1", "vios3"),
            "--vios vios1=tcp:vios1:7001 --vios vios3=tcp:vios3:7001 --tls /tls --listen unix:",
        ),
        ((), "--vios vios1=unix:/vios1 --vios vios3=unix:/vios3 --listen unix:/run/farpage-vm1.sock"),
    ],
)
def test_the_command_line_that_starts_one_names_both_vioses(tcp: tuple[str, ...], words: str) -> None:
    moved, move = begun(*tcp)
    vioses = {"vios1": moved.vioses["vios1"].control}
    intermediaries = Intermediaries(Path("/state"), vioses, Path("/tls"))
    assert not intermediaries.can_run(move)
    command = intermediaries.command("vm1", move, moved)
    assert command.startswith("farpage intermediary run vm1 ")
    assert words in command


def test_an_evacuated_client_goes_where_a_new_one_would() -> None:
    here = definition((THIRD, IN_SYNC))
    view = Viewpoint({"vios1", "vios2", "vios3"})
    assert best_device(here, "vm1", frozenset({THIRD}), view) == FIRST
    assert best_device(here, "vm1", frozenset({THIRD}), Viewpoint({"vios3"})) == SECOND
    with pytest.raises(NoDeviceFits, match="no other device within reach"):
        best_device(here, "vm1", frozenset({THIRD, FIRST}), Viewpoint({"vios1"}))
    with pytest.raises(NoDeviceFits, match="one has 0 bytes free"):
        best_device(here, "vm1", frozenset({THIRD}), Viewpoint({"vios2"}, {FIRST: GIB}))
