from __future__ import annotations

import pytest

from farpage.definition.errors import ClientMissing
from farpage.definition.model import (
    ClientRecord,
    Definition,
    DeviceRecord,
    PagingCommand,
    Reach,
    Replica,
    ReplicaState,
    ViosRecord,
    VolumeRecord,
)
from farpage.volume.resolve import Direct, NoAccess, ThroughSecond, resolve

MIB = 1 << 20
FIRST = "00000000-0000-0000-0000-000000000001"
SECOND = "00000000-0000-0000-0000-000000000002"


def definition(*replicas: tuple[str, ReplicaState]) -> Definition:
    """Device one is reached by vios1 and vios2, device two by vios3."""

    def device(name: str, *vioses: str) -> DeviceRecord:
        return DeviceRecord(
            name=name,
            kind="dir",
            size_bytes=1024 * MIB,
            reached_by=tuple(Reach(vios=vios, spec=f"dir:/{name}") for vios in vioses),
            commands=tuple(PagingCommand),
        )

    return Definition(
        revision=1,
        vioses={
            name: ViosRecord(control=f"unix:/{name}", data=(f"unix:/{name}.data",))
            for name in ("vios1", "vios2", "vios3")
        },
        devices={FIRST: device("one", "vios1", "vios2"), SECOND: device("two", "vios3")},
        clients={
            "vm1": ClientRecord(
                memory_bytes=64 * MIB,
                hypervisor="host1",
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


def test_a_device_that_a_reached_vios_serves_is_accessed_directly_over_all_such_vioses() -> None:
    access = resolve(definition((FIRST, ReplicaState.IN_SYNC)), "vm1", FIRST, {"vios1", "vios2", "vios3"})
    assert isinstance(access, Direct)
    assert [path.vios for path in access.paths] == ["vios1", "vios2"]


def test_vioses_out_of_reach_are_no_paths() -> None:
    access = resolve(definition((FIRST, ReplicaState.IN_SYNC)), "vm1", FIRST, {"vios2"})
    assert isinstance(access, Direct)
    assert [path.vios for path in access.paths] == ["vios2"]


def test_a_second_device_with_the_volume_in_sync_is_located_when_the_first_is_out_of_reach() -> None:
    both = definition((FIRST, ReplicaState.IN_SYNC), (SECOND, ReplicaState.IN_SYNC))
    access = resolve(both, "vm1", SECOND, {"vios1"})
    assert isinstance(access, ThroughSecond)
    assert access.second_device == FIRST
    assert [path.vios for path in access.paths] == ["vios1", "vios2"]


def test_a_stale_replica_is_never_the_second_device() -> None:
    stale = definition((FIRST, ReplicaState.STALE), (SECOND, ReplicaState.IN_SYNC))
    assert isinstance(resolve(stale, "vm1", SECOND, {"vios1"}), NoAccess)


def test_no_access_says_why_device_by_device() -> None:
    access = resolve(definition((SECOND, ReplicaState.IN_SYNC)), "vm1", SECOND, {"vios1"})
    assert isinstance(access, NoAccess)
    assert any("reached by VIOS vios3" in reason for reason in access.reasons)


def test_a_device_without_the_volume_and_an_unknown_device_are_no_access() -> None:
    access = resolve(definition((SECOND, ReplicaState.STALE)), "vm1", FIRST, {"vios1"})
    assert isinstance(access, NoAccess)
    assert "holds no volume" in access.reasons[0]
    unknown = resolve(definition((FIRST, ReplicaState.STALE)), "vm1", "nowhere", {"vios1"})
    assert isinstance(unknown, NoAccess)
    assert "not in the definition" in unknown.reasons[0]


def test_an_unknown_client_is_an_error() -> None:
    with pytest.raises(ClientMissing):
        resolve(definition((FIRST, ReplicaState.IN_SYNC)), "vm2", FIRST, {"vios1"})
