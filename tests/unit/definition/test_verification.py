"""What promoting a copy keeps, and what is found when a definition is compared with the volumes."""

from __future__ import annotations

import uuid

from farpage.definition import rules
from farpage.definition.compare import is_newer
from farpage.definition.model import Definition, PagingCommand, Replica, ReplicaState, ViosRecord
from farpage.definition.verification import FoundVolume, promote, volume_problems

DEVICES = [str(uuid.UUID(int=number)) for number in (1, 2)]


def definition() -> Definition:
    found = [
        rules.FoundDevice(device, f"disk{number}", "dir", "dir:/d", 1 << 30, tuple(PagingCommand))
        for number, device in enumerate(DEVICES)
    ]
    made = rules.register_vios(Definition(), "vios1", ViosRecord(control="unix:/c", data=("unix:/d",)), found)
    return rules.add_client(made, "vm1", memory_bytes=8192, hypervisor="host")


def with_replicas(before: Definition, *states: ReplicaState) -> Definition:
    client = before.clients["vm1"]
    replicas = tuple(
        Replica(device=device, state=state) for device, state in zip(DEVICES, states, strict=True)
    )
    volume = client.volumes[0].model_copy(update={"replicas": replicas})
    return rules.next_revision(before, clients={"vm1": client.model_copy(update={"volumes": (volume,)})})


def states(of: Definition) -> list[ReplicaState]:
    return [replica.state for replica in of.clients["vm1"].volumes[0].replicas]


def found_volume(epoch: int, owner: str = "", size_bytes: int = 8192) -> FoundVolume:
    return FoundVolume(
        "vm1", definition().clients["vm1"].volumes[0].replicas[0].device, size_bytes, epoch, owner
    )


def test_a_promoted_copy_is_the_newest_and_lowers_no_epoch() -> None:
    old = definition()
    newer = rules.claim(old, "vm1", "a" * 16, "host")
    newest = rules.claim(newer, "vm1", "b" * 16, "host")
    plan = promote(old, [newer, newest], volumes=[], kept={}, some_unknown=False)
    assert is_newer(plan.definition, newest)
    assert (plan.definition.clients["vm1"].epoch, plan.definition.clients["vm1"].owner) == (
        newest.clients["vm1"].epoch,
        "b" * 16,
    )
    plan = promote(old, [newer], volumes=[found_volume(99, "c" * 16)], kept={}, some_unknown=False)
    assert (plan.definition.clients["vm1"].epoch, plan.definition.clients["vm1"].owner) == (99, "c" * 16)


def test_what_a_newer_copy_calls_stale_stays_stale() -> None:
    old = with_replicas(definition(), ReplicaState.IN_SYNC, ReplicaState.IN_SYNC)
    newer = with_replicas(old, ReplicaState.IN_SYNC, ReplicaState.STALE)
    plan = promote(old, [newer], volumes=[], kept={}, some_unknown=False)
    assert states(plan.definition) == [ReplicaState.IN_SYNC, ReplicaState.STALE]
    plan = promote(newer, [old], volumes=[], kept={}, some_unknown=False)
    assert states(plan.definition) == [ReplicaState.IN_SYNC, ReplicaState.STALE]


def test_mirrored_clients_are_at_risk_only_while_a_copy_is_unknown() -> None:
    mirrored = with_replicas(definition(), ReplicaState.IN_SYNC, ReplicaState.IN_SYNC)
    assert promote(mirrored, [], volumes=[], kept={}, some_unknown=True).at_risk == ("vm1",)
    assert promote(mirrored, [], volumes=[], kept={}, some_unknown=False).at_risk == ()
    assert promote(definition(), [], volumes=[], kept={}, some_unknown=True).at_risk == ()


def test_an_attached_client_keeps_its_record_and_lost_changes_are_named() -> None:
    old = definition()
    now = rules.set_limit(rules.claim(old, "vm1", "a" * 16, "host"), "vm1", 4096)
    plan = promote(old, [now], volumes=[], kept={}, some_unknown=False)
    assert plan.lost == ("clients[vm1].limit_bytes: 4096 -> None",)
    plan = promote(old, [now], volumes=[], kept={"vm1": now.clients["vm1"]}, some_unknown=False)
    assert (plan.lost, plan.definition.clients["vm1"]) == ((), now.clients["vm1"])


def test_volumes_that_are_missing_small_or_ahead_are_named() -> None:
    made = definition()
    epoch = made.clients["vm1"].epoch
    assert volume_problems(made, {"vios1": [found_volume(epoch)]}) == ()
    assert volume_problems(made, {}) == ()
    for found, words in (
        ([], "is not there"),
        ([found_volume(epoch, size_bytes=4096)], "has 4096 bytes instead of 8192"),
        ([found_volume(epoch + 1)], f"is at epoch {epoch + 1}, above the definition's {epoch}"),
    ):
        (problem,) = volume_problems(made, {"vios1": found})
        assert words in problem
