"""A client's move from one device to another, in the definition."""

from __future__ import annotations

import pytest

from farpage.definition import moving, replacing, rules
from farpage.definition.compare import diff
from farpage.definition.errors import (
    InvalidDefinition,
    MoveMissing,
    MoveOver,
    MoveUnderWay,
    NotMovable,
    NotTheOwner,
)
from farpage.definition.model import (
    Access,
    Definition,
    Grant,
    MoveState,
    PagingCommand,
    Redundancy,
    ReplicaState,
)
from farpage.definition.moving import Claim, Route
from farpage.definition.rules import FoundDevice
from tests.unit.definition.test_definition_rules import MIB, A, B, C, defined, found

OWNER, OTHER, PRINCIPAL = "00000000000000aa", "00000000000000bb", "00000000000000cc"
CLAIM = Claim(OWNER, 0)
ROUTE = Route(source=C, source_vios="two", target=A, target_vios="one")
IN_SYNC, COPYING, RETIRED = ReplicaState.IN_SYNC, ReplicaState.COPYING, ReplicaState.RETIRED


def client_on_c(target_bytes: int = 64 * MIB) -> Definition:
    """Client vm1 on C, which VIOS two reaches; VIOS one reaches A."""
    devices = defined(one=[found(A, "a", target_bytes)], two=[found(C, "c", 2 * MIB)])
    definition = rules.add_client(
        devices, "vm1", memory_bytes=2 * MIB, hypervisor="host", redundancy=Redundancy.NONE
    )
    assert states(definition) == {C: IN_SYNC}
    return rules.claim(definition, "vm1", OWNER, "host")


def begun(*, running: bool = False) -> Definition:
    return moving.begin(client_on_c(), "vm1", CLAIM, ROUTE, PRINCIPAL, running=running)


def states(definition: Definition) -> dict[str, ReplicaState]:
    return {replica.device: replica.state for replica in definition.clients["vm1"].volumes[0].replicas}


def refusal(definition: Definition, route: Route = ROUTE, provisioned_bytes: int = 0) -> str:
    with pytest.raises(NotMovable) as caught:
        moving.begin(definition, "vm1", CLAIM, route, PRINCIPAL, provisioned_bytes=provisioned_bytes)
    return caught.value.problems


def test_each_step_is_one_revision_with_a_volume_that_is_whole() -> None:
    definition = client_on_c()
    first = moving.begin(definition, "vm1", CLAIM, ROUTE, PRINCIPAL, running=True, bandwidth_bytes=MIB)
    assert (states(first), first.moves["vm1"].state) == ({C: IN_SYNC, A: COPYING}, MoveState.PREPARING)
    assert first.moves["vm1"].bandwidth_bytes == MIB
    second = moving.start(first, "vm1", CLAIM)
    assert (states(second), second.moves["vm1"].state) == (states(first), MoveState.COPYING)
    third = moving.finish(second, "vm1", CLAIM)
    assert (states(third), third.moves["vm1"].state) == ({C: RETIRED, A: IN_SYNC}, MoveState.RETIRING)
    fourth = moving.forget(third, "vm1")
    assert (states(fourth), fourth.moves) == ({A: IN_SYNC}, {})
    steps = [definition, first, second, third, fourth]
    assert [step.revision - definition.revision for step in steps] == [0, 1, 2, 3, 4]


def test_a_client_without_a_running_pager_is_copied_at_once() -> None:
    assert begun().moves["vm1"].state is MoveState.COPYING


def test_the_intermediate_client_may_write_to_the_source_and_fill_the_target_until_the_end() -> None:
    definition = begun()
    assert moving.may(definition, PRINCIPAL, "vm1", C, Access.READ, Access.WRITE)
    assert moving.may(definition, PRINCIPAL, "vm1", A, Access.FILL)
    assert not moving.may(definition, PRINCIPAL, "vm1", A, Access.READ, Access.WRITE)
    assert not moving.may(definition, OTHER, "vm1", C, Access.WRITE)
    for ended in (moving.finish(definition, "vm1", CLAIM), moving.cancel(definition, "vm1", CLAIM)):
        assert ended.grants == ()


def test_a_grant_without_a_device_is_for_all_of_them() -> None:
    grant = Grant(principal=OTHER, volume="vm1", access=Access.READ)
    definition = rules.next_revision(client_on_c(), grants=(grant,))
    assert moving.may(definition, OTHER, "vm1", A, Access.READ)
    assert moving.may(definition, OTHER, "vm1", C, Access.READ)


def test_every_step_may_be_asked_for_again() -> None:
    definition = begun()
    assert moving.begin(definition, "vm1", CLAIM, ROUTE, OTHER) is definition
    assert moving.start(definition, "vm1", CLAIM) is definition
    finished = moving.finish(definition, "vm1", CLAIM)
    assert moving.finish(finished, "vm1", CLAIM) is finished
    over = moving.forget(finished, "vm1")
    assert moving.forget(over, "vm1") is over


def test_a_cancelled_move_leaves_the_source_and_a_target_to_delete() -> None:
    cancelled = moving.cancel(begun(running=True), "vm1", CLAIM)
    assert (states(cancelled), cancelled.moves) == ({C: IN_SYNC, A: RETIRED}, {})
    assert "given up is still on a" in refusal(cancelled)
    forgotten = replacing.forget(cancelled, "vm1", A, RETIRED)
    assert states(moving.begin(forgotten, "vm1", CLAIM, ROUTE, OTHER)) == {C: IN_SYNC, A: COPYING}


def test_pausing_and_a_bandwidth_change_the_move_alone() -> None:
    definition = begun()
    adjusted = moving.adjust(definition, "vm1", paused=True, bandwidth_bytes=MIB)
    assert diff(definition, adjusted) == (
        "moves[vm1].paused: False -> True",
        f"moves[vm1].bandwidth_bytes: None -> {MIB}",
    )
    assert moving.adjust(adjusted, "vm1", paused=True, bandwidth_bytes=MIB) is adjusted


def test_what_a_move_is_too_far_for_is_refused() -> None:
    preparing, retiring = begun(running=True), moving.finish(begun(), "vm1", CLAIM)
    with pytest.raises(MoveOver, match="it cannot be finished"):
        moving.finish(preparing, "vm1", CLAIM)
    with pytest.raises(MoveOver, match="still counts"):
        moving.forget(preparing, "vm1")
    with pytest.raises(MoveOver, match="not whole any more"):
        moving.cancel(retiring, "vm1", CLAIM)
    with pytest.raises(MoveOver, match="nothing is copied"):
        moving.adjust(retiring, "vm1", paused=True, bandwidth_bytes=None)
    for step in (moving.start, moving.finish, moving.cancel):
        with pytest.raises(MoveMissing, match="client move vm1"):
            step(client_on_c(), "vm1", CLAIM)


def test_only_the_owner_moves_a_client_and_its_epoch_goes_along() -> None:
    definition, newest = begun(), Claim(OWNER, 1000)
    for step in (moving.finish, moving.cancel):
        with pytest.raises(NotTheOwner):
            step(definition, "vm1", Claim(OTHER, 1000))
        assert step(definition, "vm1", newest).clients["vm1"].epoch == 1000
    with pytest.raises(NotTheOwner):
        moving.begin(client_on_c(), "vm1", Claim("", 5), ROUTE, PRINCIPAL)
    assert moving.begin(client_on_c(), "vm1", newest, ROUTE, PRINCIPAL).clients["vm1"].epoch == 1000


def test_everything_in_the_way_is_said() -> None:
    definition = client_on_c(target_bytes=MIB)
    assert "a has 1048576 bytes free, and 2097152 are needed" in refusal(definition)
    assert "bytes free" in refusal(client_on_c(), provisioned_bytes=63 * MIB)
    assert refusal(definition, Route(C, "two", C, "two")) == "it is there already"
    assert "VIOS two does not reach a" in refusal(definition, Route(C, "two", A, "two"))
    assert "its replica on a is not there" in refusal(definition, Route(A, "one", C, "two"))
    assert "it is being moved from c to a" in refusal(begun(), Route(C, "one", A, "one"))
    reader = FoundDevice(A, "a", "dir", "dir:/a", 64 * MIB, (PagingCommand.OPEN, PagingCommand.PAGE_IN))
    limited = definition.devices[A].model_copy(update={"commands": reader.commands})
    assert "page_out" in refusal(
        definition.model_copy(update={"devices": {**definition.devices, A: limited}})
    )


def test_a_mirror_is_not_moved_but_has_a_device_replaced() -> None:
    mirrored = rules.add_client(
        defined(one=[found(A, "a"), found(B, "b")], two=[found(C, "c")]),
        "vm1",
        memory_bytes=MIB,
        hypervisor="host",
        redundancy=Redundancy.MIRROR,
    )
    (free,) = {A, B} - set(states(mirrored))
    with pytest.raises(NotMovable, match="more than one replica"):
        moving.begin(mirrored, "vm1", Claim("", 0), Route(C, "two", free, "one"), PRINCIPAL)


def test_a_client_that_is_moved_has_no_device_replaced() -> None:
    with pytest.raises(MoveUnderWay, match="client cancel-move vm1"):
        replacing.plan(begun(), "c", "a", replacing.Replacing("host", frozenset({"one", "two"}), {}))


def test_a_removed_client_takes_its_move_along() -> None:
    removed = rules.remove_client(begun(), "vm1")
    assert (removed.moves, removed.grants) == ({}, ())


def test_a_move_whose_replicas_say_something_else_is_unsound() -> None:
    definition = begun()
    move, client = definition.moves["vm1"], definition.clients["vm1"]

    def problems(**changes: object) -> str:
        with pytest.raises(InvalidDefinition) as caught:
            rules.check(definition.model_copy(update=changes))
        return caught.value.problems

    assert "no move fills it" in problems(moves={})
    assert "so the replica on device" in problems(
        moves={"vm1": move.model_copy(update={"state": MoveState.RETIRING})}
    )
    assert "it is the source" in problems(moves={"vm1": move.model_copy(update={"target": C})})
    assert "VIOS 'ghost'" in problems(moves={"vm1": move.model_copy(update={"source_vios": "ghost"})})
    assert "has no volume 'v'" in problems(moves={"vm1": move.model_copy(update={"volume": "v"})})
    assert "client 'vm2' is not" in problems(moves={"vm1": move, "vm2": move})
    assert "principal is used twice" in problems(
        clients={"vm1": client, "vm2": client}, moves={"vm1": move, "vm2": move}
    )
    grant = Grant(principal=OTHER, volume="vm1", access=Access.READ, device=A.replace("0", "f"))
    assert "grants: device" in problems(grants=(grant,))


def test_a_difference_tells_no_whole_principal() -> None:
    lines = diff(client_on_c(), begun())
    assert f"grants: + fill volume vm1 on device {A} for 0000..." in lines
    assert "moves[vm1]: added" in lines
    assert not any(PRINCIPAL in line for line in lines)


def test_a_document_from_before_moves_is_read() -> None:
    definition = client_on_c()
    old = definition.model_dump(mode="json")
    del old["moves"]
    assert Definition.model_validate(old) == definition
