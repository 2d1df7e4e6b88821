"""One device in the place of another, in the definition."""

from __future__ import annotations

import pytest

from farpage.definition import releasing, replacing, rules
from farpage.definition.errors import DeviceMissing, InvalidDefinition, NotReplaceable
from farpage.definition.model import Definition, Redundancy, Release, ReplicaState, ViosRedundancy
from tests.unit.definition.test_definition_rules import MIB, A, B, C, defined, found

ASKING = replacing.Replacing("host", frozenset({"one", "two"}), {})
IN_SYNC, STALE, RETIRED = ReplicaState.IN_SYNC, ReplicaState.STALE, ReplicaState.RETIRED


def clients(
    redundancy: Redundancy = Redundancy.PATH, vios_redundancy: ViosRedundancy = ViosRedundancy.IF_POSSIBLE
) -> Definition:
    """Client vm1: on B alone, which both VIOS reach; as a mirror on A (VIOS one) and C (VIOS two)."""
    devices = defined(
        one=[found(A, "a"), found(B, "b", 2 * MIB)], two=[found(B, "b", 2 * MIB), found(C, "c")]
    )
    return rules.add_client(
        devices,
        "vm1",
        memory_bytes=MIB,
        hypervisor="host",
        redundancy=redundancy,
        vios_redundancy=vios_redundancy,
    )


def states(definition: Definition) -> dict[str, ReplicaState]:
    return {replica.device: replica.state for replica in definition.clients["vm1"].volumes[0].replicas}


def refusal(definition: Definition, old: str, new: str, asking: replacing.Replacing = ASKING) -> str:
    with pytest.raises(NotReplaceable) as caught:
        replacing.plan(definition, old, new, asking)
    return caught.value.problems


def test_a_client_goes_from_one_device_to_the_other_in_steps_that_each_can_serve_it() -> None:
    definition = clients()
    assert replacing.plan(definition, "b", "a", ASKING) == ("vm1",)
    begun = replacing.begin(definition, "vm1", A)
    assert states(begun) == {B: IN_SYNC, A: STALE}
    assert replacing.begin(begun, "vm1", A) is begun
    retired = replacing.finish(begun, "vm1", B, A)
    assert states(retired) == {B: RETIRED, A: IN_SYNC}
    assert states(replacing.forget(retired, "vm1", B, RETIRED)) == {A: IN_SYNC}


def test_what_is_in_sync_is_never_forgotten_nor_the_last_of_it_retired() -> None:
    definition = clients()
    assert replacing.forget(definition, "vm1", B, RETIRED) is definition
    with pytest.raises(InvalidDefinition, match="none is in sync"):
        replacing.finish(definition, "vm1", B, A)


def test_a_replacement_that_was_cut_short_is_gone_on_with() -> None:
    begun = replacing.begin(clients(), "vm1", A)
    assert replacing.plan(begun, "b", "a", ASKING) == ("vm1",)
    retired = replacing.finish(begun, "vm1", B, A)
    assert replacing.plan(retired, "b", "a", ASKING) == ("vm1",)


def test_a_replica_that_was_retired_may_come_back_to_its_device() -> None:
    retired = replacing.finish(replacing.begin(clients(), "vm1", A), "vm1", B, A)
    assert states(replacing.begin(retired, "vm1", B)) == {A: IN_SYNC, B: STALE}


def test_what_cannot_be_is_refused_with_every_reason() -> None:
    definition = clients()
    assert refusal(definition, "b", "b") == "they are one device"
    with pytest.raises(DeviceMissing, match="a, b, c"):
        replacing.plan(definition, "b", "d", ASKING)
    elsewhere = replacing.Replacing("host", frozenset({"two"}), {})
    assert "reached by VIOS one" in refusal(definition, "b", "a", elsewhere)
    full = replacing.Replacing("other", frozenset({"one"}), {A: 64 * MIB})
    problems = refusal(definition, "b", "a", full)
    assert "belongs to hypervisor 'host'" in problems
    assert f"has 0 bytes free, and {MIB} are needed" in problems


def test_wishes_for_redundancy_that_would_be_unmet_are_named() -> None:
    required = clients(vios_redundancy=ViosRedundancy.REQUIRED)
    assert "client vm1 requires two VIOS, and a is reached over one alone" in refusal(required, "b", "a")
    mirror = clients(Redundancy.MIRROR)
    assert set(states(mirror)) == {A, C}
    assert "client vm1 has a replica on a already" in refusal(mirror, "c", "a")
    assert replacing.plan(mirror, "c", "b", ASKING) == ("vm1",)
    behind_one = replacing.Replacing("host", frozenset({"one"}), {})
    assert "all of it would be behind VIOS one" in refusal(mirror, "c", "b", behind_one)


def test_the_owner_of_a_mirror_may_record_a_replica_retired() -> None:
    begun = replacing.begin(clients(Redundancy.MIRROR), "vm1", B)
    epoch = begun.clients["vm1"].epoch
    recorded = rules.set_replica_states(begun, "vm1", "", epoch, {A: IN_SYNC, B: IN_SYNC, C: RETIRED})
    assert states(recorded) == {A: IN_SYNC, C: RETIRED, B: IN_SYNC}
    assert {path.device for path in rules.paths(recorded, "vm1")} == {A, B}


def test_a_released_client_has_its_pages_where_they_are() -> None:
    begun = replacing.begin(clients(), "vm1", A)
    released = Release(hypervisor="other", epoch=1, digest="0" * 64)
    gone = releasing.release(begun, "vm1", begun.clients["vm1"].owner, 1, released)
    assert "client vm1 is released" in refusal(gone, "b", "a")
    with pytest.raises(releasing.ClientReleased):
        replacing.finish(gone, "vm1", B, A)
    with pytest.raises(releasing.ClientReleased):
        replacing.begin(gone, "vm1", C)
