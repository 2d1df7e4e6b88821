from __future__ import annotations

import pytest

from farpage.definition import moving
from farpage.definition.errors import ClientMissing
from farpage.definition.model import (
    ClientRecord,
    Definition,
    DeviceRecord,
    PagingCommand,
    Reach,
    Redundancy,
    Replica,
    ReplicaState,
    ViosRecord,
    VolumeRecord,
)
from farpage.volume.resolve import (
    Decision,
    Direct,
    Edge,
    Indirect,
    Place,
    Standing,
    Unreachable,
    Viewpoint,
    resolve,
)

MIB = 1 << 20
GIB = 1 << 30
FIRST = "00000000-0000-0000-0000-000000000001"
SECOND = "00000000-0000-0000-0000-000000000002"
THIRD = "00000000-0000-0000-0000-000000000003"
IN_SYNC, STALE, RETIRED = ReplicaState.IN_SYNC, ReplicaState.STALE, ReplicaState.RETIRED


def definition(
    *replicas: tuple[str, ReplicaState],
    tcp: tuple[str, ...] = ("vios1", "vios2", "vios3"),
    third_bytes: int = GIB,
    redundancy: Redundancy = Redundancy.PATH,
) -> Definition:
    """Device one is reached by vios1 and vios2, two by vios3, three by vios1; those of `tcp` answer there."""

    def device(name: str, *vioses: str, size_bytes: int = GIB) -> DeviceRecord:
        return DeviceRecord(
            name=name,
            kind="dir",
            size_bytes=size_bytes,
            reached_by=tuple(Reach(vios=vios, spec=f"dir:/{name}") for vios in vioses),
            commands=tuple(PagingCommand),
        )

    def vios(name: str) -> ViosRecord:
        if name in tcp:
            return ViosRecord(control=f"tcp:{name}:7001", data=(f"unix:/{name}.data", f"tcp:{name}:7002"))
        return ViosRecord(control=f"unix:/{name}", data=(f"unix:/{name}.data",))

    return Definition(
        revision=1,
        vioses={name: vios(name) for name in ("vios1", "vios2", "vios3")},
        devices={
            FIRST: device("one", "vios1", "vios2"),
            SECOND: device("two", "vios3"),
            THIRD: device("three", "vios1", size_bytes=third_bytes),
        },
        clients={
            "vm1": ClientRecord(
                memory_bytes=64 * MIB,
                hypervisor="host1",
                redundancy=redundancy,
                volumes=(
                    VolumeRecord(
                        name="vm1",
                        size_bytes=64 * MIB,
                        replicas=tuple(Replica(device=where, state=state) for where, state in replicas),
                    ),
                ),
            )
        },
    )


def decide(
    document: Definition, device: str, *reached: str, indirect: bool = False, client: str = "vm1"
) -> Decision:
    return resolve(document, client, device, Viewpoint(frozenset(reached)), indirect=indirect)


def edge(decision: Decision, vios: str, device: str) -> Edge:
    (found,) = [e for e in decision.edges if (e.vios, e.device) == (vios, device)]
    return found


# Direct


def test_a_device_that_a_reached_vios_serves_is_accessed_directly_over_all_such_vioses() -> None:
    access = decide(definition((FIRST, IN_SYNC)), FIRST, "vios1", "vios2", "vios3")
    assert isinstance(access, Direct)
    assert [path.vios for path in access.paths] == ["vios1", "vios2"]


def test_vioses_out_of_reach_are_no_paths() -> None:
    access = decide(definition((FIRST, IN_SYNC)), FIRST, "vios2")
    assert isinstance(access, Direct)
    assert [path.vios for path in access.paths] == ["vios2"]
    assert edge(access, "vios2", FIRST).taken
    assert "does not reach VIOS vios1" in edge(access, "vios1", FIRST).why


def test_a_volume_goes_directly_between_two_devices_within_reach() -> None:
    access = decide(definition((SECOND, IN_SYNC)), FIRST, "vios1", "vios3")
    assert isinstance(access, Direct)
    assert (access.device, access.source) == (FIRST, SECOND)
    assert [(path.vios, path.device) for path in access.paths] == [("vios3", SECOND)]
    assert "where the volume is now" in edge(access, "vios3", SECOND).why


def test_without_a_location_the_volume_s_own_device_counts() -> None:
    access = decide(definition((FIRST, STALE), (SECOND, IN_SYNC)), "", "vios1", "vios3")
    assert isinstance(access, Direct)
    assert access.device == SECOND


# Indirect


def test_a_second_device_is_located_when_the_volume_is_out_of_reach() -> None:
    access = decide(definition((SECOND, IN_SYNC)), FIRST, "vios2")
    assert isinstance(access, Indirect)
    assert access.route == moving.Route(SECOND, "vios3", FIRST, "vios2")
    assert edge(access, "vios2", FIRST).taken
    assert edge(access, "vios3", SECOND).taken
    assert not edge(access, "vios1", FIRST).taken
    assert {e.device for e in access.edges} == {FIRST, SECOND, THIRD}


def test_a_first_device_is_chosen_for_a_volume_that_is_out_of_reach() -> None:
    for location in ("", SECOND):
        access = decide(definition((SECOND, IN_SYNC)), location, "vios1", "vios2")
        assert isinstance(access, Indirect)
        # Common devices first, as for a new client.
        assert (access.first_device, access.second_device) == (FIRST, SECOND)
    only = decide(definition((SECOND, IN_SYNC), third_bytes=80 * MIB), "", "vios1")
    assert isinstance(only, Indirect)
    # Of two that one VIOS reaches the one with the least room.
    assert only.first_device == THIRD


def test_direct_access_can_be_declined() -> None:
    access = decide(definition((SECOND, IN_SYNC)), FIRST, "vios1", "vios3", indirect=True)
    assert isinstance(access, Indirect)
    assert access.standing == Standing(Place.HYPERVISOR)
    held = decide(definition((FIRST, IN_SYNC)), FIRST, "vios1", indirect=True)
    assert isinstance(held, Unreachable)
    assert "on it already" in held.reasons[0]


def test_two_vios_are_preferred_to_one_twice() -> None:
    access = decide(definition((THIRD, IN_SYNC)), FIRST, "vios1", "vios2", indirect=True)
    assert isinstance(access, Indirect)
    assert (access.first_vios, access.second_vios) == ("vios2", "vios1")


@pytest.mark.parametrize(
    ("tcp", "standing", "words"),
    [
        (("vios1", "vios3"), Standing(Place.ANYWHERE), "any host that reaches both"),
        (("vios1",), Standing(Place.VIOS_HOST, ("vios3",)), "on the host of VIOS vios3"),
        (("vios3",), Standing(Place.VIOS_HOST, ("vios1",)), "on the host of VIOS vios1"),
        ((), Standing(Place.VIOS_HOST, ("vios1", "vios3")), "the one host of VIOS vios1 and vios3"),
    ],
)
def test_an_intermediate_client_stands_where_both_vios_answer(
    tcp: tuple[str, ...], standing: Standing, words: str
) -> None:
    access = decide(definition((SECOND, IN_SYNC), tcp=tcp), FIRST, "vios1")
    assert isinstance(access, Indirect)
    assert access.standing == standing
    assert words in str(standing)


def test_the_vios_that_asks_least_of_the_intermediate_client_is_the_first() -> None:
    access = decide(definition((SECOND, IN_SYNC), tcp=("vios2", "vios3")), FIRST, "vios1", "vios2")
    assert isinstance(access, Indirect)
    assert access.first_vios == "vios2"


def test_a_move_under_way_is_the_way() -> None:
    route = moving.Route(SECOND, "vios3", THIRD, "vios1")
    moved = moving.begin(definition((SECOND, IN_SYNC)), "vm1", moving.Claim("", 0), route, "0" * 16)
    for location in ("", THIRD):
        access = decide(moved, location, "vios1", "vios2", "vios3")
        assert isinstance(access, Indirect)
        assert (access.route, access.under_way) == (route, True)
    away = decide(moved, "", "vios2")
    assert isinstance(away, Unreachable)
    assert "moved over VIOS vios1" in away.reasons[0]
    other = decide(moved, FIRST, "vios1")
    assert isinstance(other, Unreachable)
    assert "it is being moved from two to three" in other.reasons


def test_a_finished_move_is_no_way_any_more() -> None:
    route = moving.Route(SECOND, "vios3", THIRD, "vios1")
    moved = moving.begin(definition((SECOND, IN_SYNC)), "vm1", moving.Claim("", 0), route, "0" * 16)
    access = decide(moving.finish(moved, "vm1", moving.Claim("", 0)), "", "vios1")
    assert isinstance(access, Direct)
    assert access.device == THIRD


# Unreachable


def test_a_stale_replica_is_never_the_second_device() -> None:
    stale = decide(definition((SECOND, STALE)), FIRST, "vios1")
    assert isinstance(stale, Unreachable)
    assert stale.reasons == ("no device holds the volume in sync",)


def test_a_place_out_of_reach_that_has_no_data_is_unreachable() -> None:
    access = decide(definition((FIRST, IN_SYNC)), SECOND, "vios1")
    assert isinstance(access, Unreachable)
    assert access.reasons[0] == "device two is reached by VIOS vios3; the hypervisor reaches vios1"
    assert "the volume is not on two" in edge(access, "vios3", SECOND).why


def test_no_first_device_that_fits_says_of_each_why() -> None:
    full = definition((SECOND, IN_SYNC))
    access = resolve(full, "vm1", "", Viewpoint({"vios1"}, {FIRST: GIB, THIRD: GIB - MIB}))
    assert isinstance(access, Unreachable)
    assert "one has 0 bytes free; three has 1048576 bytes free" in access.reasons[1]
    nothing = decide(definition((FIRST, IN_SYNC)), "", "vios3", client="vm1")
    assert isinstance(nothing, Indirect)
    assert nothing.first_device == SECOND


def test_a_mirror_with_one_half_in_reach_needs_no_second_device() -> None:
    mirror = definition((FIRST, IN_SYNC), (SECOND, IN_SYNC), redundancy=Redundancy.MIRROR)
    access = decide(mirror, SECOND, "vios1")
    assert isinstance(access, Unreachable)
    assert "one holds the volume too" in access.reasons
    moved = decide(mirror, THIRD, "vios1", indirect=True)
    assert isinstance(moved, Unreachable)
    assert "more than one replica" in moved.reasons[0]


def test_an_unknown_device_is_unreachable() -> None:
    unknown = decide(definition((FIRST, STALE)), "nowhere", "vios1")
    assert isinstance(unknown, Unreachable)
    assert "not in the definition" in unknown.reasons[0]


def test_every_decision_tells_of_every_vios_and_device_that_it_reaches() -> None:
    for location in ("", FIRST, SECOND, THIRD):
        for reached in (("vios1",), ("vios3",), ("vios1", "vios2", "vios3"), ()):
            decision = decide(definition((SECOND, IN_SYNC)), location, *reached)
            assert [(e.vios, e.device) for e in decision.edges] == [
                ("vios1", FIRST), ("vios2", FIRST), ("vios1", THIRD), ("vios3", SECOND),
            ]  # fmt: skip
            assert all(e.why for e in decision.edges)
            assert any(e.taken for e in decision.edges) != isinstance(decision, Unreachable)


def test_an_unknown_client_is_an_error() -> None:
    with pytest.raises(ClientMissing):
        decide(definition((FIRST, IN_SYNC)), FIRST, "vios1", client="vm2")
