from __future__ import annotations

import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pydantic import ValidationError

from farpage.definition import rules
from farpage.definition.compare import compare, diff, is_newer
from farpage.definition.document import canonical_json
from farpage.definition.errors import (
    ClientExists,
    ClientMissing,
    DeviceMismatch,
    InvalidDefinition,
    NoDeviceFits,
    NotTheOwner,
)
from farpage.definition.model import (
    Access,
    Definition,
    Grant,
    PagingCommand,
    Redundancy,
    Replica,
    ReplicaState,
    ViosRecord,
    ViosRedundancy,
)
from farpage.definition.rules import FoundDevice
from farpage.errors import FarpageError

MIB = 1 << 20
ALL = tuple(PagingCommand)
A, B, C = (str(uuid.UUID(int=number)) for number in (10, 11, 12))


def vios(name: str) -> ViosRecord:
    return ViosRecord(control=f"unix:/run/{name}/control", data=(f"unix:/run/{name}/data",))


def found(identifier: str, name: str, size_bytes: int = 64 * MIB) -> FoundDevice:
    return FoundDevice(identifier, name, "dir", f"dir:/srv/{name}", size_bytes, ALL)


def defined(**reached: list[FoundDevice]) -> Definition:
    """A definition of VIOS and what each reaches: `defined(one=[...], two=[...])`."""
    definition = Definition()
    for name, devices in reached.items():
        definition = rules.register_vios(definition, name, vios(name), devices)
    return definition


@pytest.fixture
def two_vios() -> Definition:
    """VIOS one reaches A and B, two reaches B and C: B is common."""
    return defined(one=[found(A, "a", 16 * MIB), found(B, "b")], two=[found(B, "b"), found(C, "c", 32 * MIB)])


# Registration


def test_a_device_that_two_vios_find_is_a_common_one(two_vios: Definition) -> None:
    assert two_vios.devices[B].is_common
    assert not two_vios.devices[A].is_common
    assert [reach.vios for reach in two_vios.devices[B].reached_by] == ["one", "two"]


def test_a_registered_device_is_configured_for_what_it_can_do() -> None:
    able = (PagingCommand.CLOSE, PagingCommand.OPEN, PagingCommand.PAGE_IN)
    definition = defined(one=[FoundDevice(A, "a", "dir", "dir:/a", MIB, able)])
    assert definition.devices[A].commands == (PagingCommand.OPEN, PagingCommand.PAGE_IN, PagingCommand.CLOSE)


def test_commands_that_were_taken_away_do_not_come_back(two_vios: Definition) -> None:
    device = two_vios.devices[B]
    fewer = tuple(command for command in ALL if command is not PagingCommand.DISCARD)
    limited = rules.next_revision(
        two_vios, devices={**two_vios.devices, B: device.model_copy(update={"commands": fewer})}
    )
    again = rules.register_vios(limited, "one", vios("one"), [found(A, "a", 16 * MIB), found(B, "b")])
    assert again.devices[B].commands == fewer


def test_registering_the_same_again_changes_nothing(two_vios: Definition) -> None:
    again = rules.register_vios(two_vios, "one", vios("one"), [found(A, "a", 16 * MIB), found(B, "b")])
    assert again is two_vios


def test_devices_of_one_name_are_numbered() -> None:
    definition = defined(one=[found(A, "disk"), found(B, "disk")], two=[found(C, "disk")])
    assert sorted(device.name for device in definition.devices.values()) == ["disk", "disk-2", "disk-3"]


def test_a_device_that_is_gone_goes_unless_a_client_is_on_it(two_vios: Definition) -> None:
    without_b = rules.register_vios(two_vios, "one", vios("one"), [found(A, "a", 16 * MIB)])
    assert [reach.vios for reach in without_b.devices[B].reached_by] == ["two"]
    nothing = rules.register_vios(without_b, "two", vios("two"), [])
    assert set(nothing.devices) == {A}
    used = rules.add_client(without_b, "vm1", memory_bytes=60 * MIB, hypervisor="host")
    assert B in rules.register_vios(used, "two", vios("two"), []).devices


def test_a_device_that_two_vios_describe_differently_is_refused(two_vios: Definition) -> None:
    with pytest.raises(DeviceMismatch) as caught:
        rules.register_vios(two_vios, "three", vios("three"), [found(B, "b", MIB)])
    assert caught.value.vios == "three"


# Placement


def placed(definition: Definition, memory_bytes: int, **wish: object) -> str:
    added = rules.add_client(
        definition,
        "vm1",
        memory_bytes=memory_bytes,
        hypervisor="host",
        **wish,  # type: ignore[arg-type]
    )
    return added.clients["vm1"].volumes[0].replicas[0].device


def test_paths_take_a_common_device(two_vios: Definition) -> None:
    assert placed(two_vios, 8 * MIB) == B


def test_without_redundancy_the_smallest_device_that_fits_is_taken(two_vios: Definition) -> None:
    assert placed(two_vios, 8 * MIB, redundancy=Redundancy.NONE) == A
    assert placed(two_vios, 20 * MIB, redundancy=Redundancy.NONE) == C
    assert placed(two_vios, 40 * MIB, redundancy=Redundancy.NONE) == B


def test_without_a_common_device_an_independent_one_will_do_if_possible_is_wished() -> None:
    definition = defined(one=[found(A, "a")], two=[found(C, "c", 32 * MIB)])
    assert placed(definition, MIB) == C
    with pytest.raises(NoDeviceFits, match="two are required"):
        placed(definition, MIB, vios_redundancy=ViosRedundancy.REQUIRED)


def test_room_that_others_use_is_not_free(two_vios: Definition) -> None:
    with pytest.raises(NoDeviceFits) as caught:
        placed(two_vios, 40 * MIB, provisioned_bytes={B: 30 * MIB})
    assert "b has 35651584 bytes free" in str(caught.value)
    full = rules.add_client(two_vios, "other", memory_bytes=60 * MIB, hypervisor="host")
    assert placed(full, 8 * MIB, vios_redundancy=ViosRedundancy.NONE) == A


def test_a_refusal_says_for_each_device_why_not(two_vios: Definition) -> None:
    with pytest.raises(NoDeviceFits) as caught:
        placed(two_vios, 1 << 40)
    assert all(name in caught.value.reasons for name in ("a has", "b has", "c has"))
    with pytest.raises(NoDeviceFits, match="there is no device"):
        placed(Definition(), MIB)


def test_a_device_that_cannot_page_out_is_not_taken() -> None:
    reader = FoundDevice(A, "a", "dir", "dir:/a", MIB, (PagingCommand.OPEN, PagingCommand.PAGE_IN))
    with pytest.raises(NoDeviceFits, match="page_out"):
        placed(defined(one=[reader]), 4096)


def with_mirror() -> Definition:
    """A mirrored client on A, which VIOS one reaches, and C, which two does."""
    return rules.add_client(
        defined(one=[found(A, "a")], two=[found(C, "c")]),
        "vm1",
        memory_bytes=MIB,
        hypervisor="host",
        redundancy=Redundancy.MIRROR,
    )


def test_a_mirror_takes_two_devices_over_different_vios() -> None:
    mirrored = with_mirror()
    replicas = mirrored.clients["vm1"].volumes[0].replicas
    reached = [mirrored.devices[replica.device].reached_by for replica in replicas]
    assert [reach[0].vios for reach in reached] == ["one", "two"]


def test_a_mirror_on_devices_of_one_vios_is_refused_with_the_reason() -> None:
    only = defined(one=[found(A, "a"), found(C, "c")])
    with pytest.raises(NoDeviceFits, match="a fits, but no second device over another VIOS"):
        placed(only, 4096, redundancy=Redundancy.MIRROR)


def test_a_stale_replica_is_recorded_with_the_epoch_of_its_owner() -> None:
    claimed = rules.claim(with_mirror(), "vm1", "me", "host")
    changed = rules.set_replica_states(claimed, "vm1", "me", 70, {A: ReplicaState.STALE})
    record = changed.clients["vm1"]
    assert record.epoch == 70
    assert [replica.state for replica in record.volumes[0].replicas] == [
        ReplicaState.STALE,
        ReplicaState.IN_SYNC,
    ]


def test_nobody_but_the_owner_says_what_a_replica_is_worth() -> None:
    claimed = rules.claim(with_mirror(), "vm1", "me", "host")
    with pytest.raises(NotTheOwner):
        rules.set_replica_states(claimed, "vm1", "another", 70, {A: ReplicaState.STALE})


def test_the_last_replica_in_sync_cannot_become_stale() -> None:
    claimed = rules.claim(with_mirror(), "vm1", "me", "host")
    stale = dict.fromkeys([A, C], ReplicaState.STALE)
    with pytest.raises(InvalidDefinition, match="none is in sync"):
        rules.set_replica_states(claimed, "vm1", "me", 70, stale)


# Clients


def test_a_client_s_paths_are_the_vios_of_its_device(two_vios: Definition) -> None:
    definition = rules.add_client(two_vios, "vm1", memory_bytes=8 * MIB, hypervisor="host")
    paths = rules.paths(definition, "vm1")
    assert [(path.vios, path.device, path.volume, path.epoch) for path in paths] == [
        ("one", B, "vm1", definition.revision),
        ("two", B, "vm1", definition.revision),
    ]
    assert paths[0].data == ("unix:/run/one/data",)


def test_a_name_is_taken_once(two_vios: Definition) -> None:
    definition = rules.add_client(two_vios, "vm1", memory_bytes=MIB, hypervisor="host")
    with pytest.raises(ClientExists):
        rules.add_client(definition, "vm1", memory_bytes=MIB, hypervisor="host")


def test_removing_a_client_takes_its_grants_along(two_vios: Definition) -> None:
    definition = rules.add_client(two_vios, "vm1", memory_bytes=MIB, hypervisor="host")
    grant = Grant(principal="copier", volume="vm1", access=Access.READ)
    definition = rules.next_revision(definition, grants=(grant,))
    removed = rules.remove_client(definition, "vm1")
    assert (removed.clients, removed.grants) == ({}, ())
    assert removed.revision == definition.revision + 1


def test_an_unknown_client_is_named() -> None:
    for change in (rules.remove_client, rules.raise_epoch, rules.paths):
        with pytest.raises(ClientMissing, match="'ghost'"):
            change(Definition(), "ghost")


@given(st.lists(st.integers(0, 50), max_size=10))
def test_an_epoch_never_falls(wanted: list[int]) -> None:
    definition = rules.add_client(defined(one=[found(A, "a")]), "vm1", memory_bytes=MIB, hypervisor="host")
    for at_least in wanted:
        before = definition.clients["vm1"].epoch
        definition = rules.raise_epoch(definition, "vm1", at_least)
        assert definition.clients["vm1"].epoch == max(before + 1, at_least)


def test_a_claim_gives_a_client_to_a_new_owner_above_every_epoch_known() -> None:
    definition = rules.add_client(defined(one=[found(A, "a")]), "vm1", memory_bytes=MIB, hypervisor="host")
    assert definition.clients["vm1"].owner == ""
    claimed = rules.claim(definition, "vm1", "00000000000000aa", "other", 40)
    record = claimed.clients["vm1"]
    assert (record.owner, record.hypervisor, record.epoch) == ("00000000000000aa", "other", 40)
    assert rules.claims(claimed) == {"vm1": (40, "00000000000000aa")}
    assert compare({"one": definition, "two": claimed}).newest == claimed


def test_an_owner_s_own_takeover_keeps_its_claim() -> None:
    definition = rules.add_client(defined(one=[found(A, "a")]), "vm1", memory_bytes=MIB, hypervisor="host")
    definition = rules.claim(definition, "vm1", "00000000000000aa", "host")
    raised = rules.raise_epoch(definition, "vm1")
    assert raised.clients["vm1"].owner == "00000000000000aa"
    assert raised.clients["vm1"].epoch == definition.clients["vm1"].epoch + 1


def test_a_document_from_before_owners_were_told_apart_is_read() -> None:
    definition = rules.add_client(defined(one=[found(A, "a")]), "vm1", memory_bytes=MIB, hypervisor="host")
    old = definition.model_dump(mode="json")
    del old["clients"]["vm1"]["owner"]
    assert Definition.model_validate(old) == definition


def test_a_client_made_anew_begins_above_every_epoch_of_the_old_one(two_vios: Definition) -> None:
    definition = rules.add_client(two_vios, "vm1", memory_bytes=MIB, hypervisor="host")
    definition = old = rules.raise_epoch(definition, "vm1", 70)
    definition = rules.remove_client(definition, "vm1")
    definition = rules.add_client(definition, "vm1", memory_bytes=MIB, hypervisor="host")
    assert definition.clients["vm1"].epoch > 70
    assert compare({"one": old, "two": definition}).newest == definition


def test_a_lost_vios_leaves_a_wish_unmet_and_the_document_sound(two_vios: Definition) -> None:
    definition = rules.add_client(
        two_vios, "vm1", memory_bytes=MIB, hypervisor="host", vios_redundancy=ViosRedundancy.REQUIRED
    )
    assert rules.unmet_wishes(definition) == ()
    lost = rules.register_vios(definition, "one", vios("one"), [])
    assert rules.unmet_wishes(lost) == ("client vm1 requires two VIOS and is reached by two",)


# Soundness


def broken(definition: Definition, **changes: object) -> str:
    with pytest.raises(InvalidDefinition) as caught:
        rules.check(definition.model_copy(update=changes))
    return caught.value.problems


def test_every_contradiction_is_named(two_vios: Definition) -> None:
    definition = rules.add_client(two_vios, "vm1", memory_bytes=8 * MIB, hypervisor="host")
    client = definition.clients["vm1"]
    volume = client.volumes[0]
    missing = str(uuid.UUID(int=99))
    assert "VIOS 'one' is not in the definition" in broken(definition, vioses={"two": vios("two")})
    assert "volume 'ghost'" in broken(
        definition, grants=(Grant(principal="x", volume="ghost", access=Access.READ),)
    )
    assert "'vm1' is used twice" in broken(definition, clients={"vm1": client, "vm2": client})
    for changed, problem in (
        ({"entitlement_bytes": 9 * MIB}, "entitlement_bytes"),
        ({"memory_bytes": 9 * MIB}, "smaller than the memory"),
        ({"volumes": (_on(volume, missing),)}, f"device {missing} is not"),
        ({"volumes": (_on(volume, B, B),)}, "is named twice"),
        ({"redundancy": Redundancy.MIRROR}, "needs two"),
        ({"volumes": (volume.model_copy(update={"size_bytes": 1 << 40}),)}, "less than its volumes'"),
    ):
        assert problem in broken(definition, clients={"vm1": client.model_copy(update=changed)})
    assert "'b' is used twice" in broken(
        definition,
        devices={**definition.devices, A: definition.devices[A].model_copy(update={"name": "b"})},
    )


def _on(volume: object, *devices: str) -> object:
    replicas = tuple(Replica(device=device, state=ReplicaState.IN_SYNC) for device in devices)
    return volume.model_copy(update={"replicas": replicas})  # type: ignore[attr-defined]


def test_unknown_fields_and_formats_are_refused() -> None:
    with pytest.raises(ValidationError):
        Definition.model_validate({"format": 2})
    with pytest.raises(ValidationError):
        Definition.model_validate({"colour": "red"})


# Text, comparison, differences


def test_one_content_has_one_text(two_vios: Definition) -> None:
    text = canonical_json(two_vios)
    read = Definition.model_validate_json(text)
    assert read == two_vios
    turned = read.model_copy(update={"devices": dict(reversed(read.devices.items()))})
    assert canonical_json(turned) == text
    assert "\n" not in text


def test_the_highest_revision_is_the_newest_and_the_others_lag(two_vios: Definition) -> None:
    newer = rules.add_client(two_vios, "vm1", memory_bytes=MIB, hypervisor="host")
    found = compare({"one": two_vios, "two": newer, "three": newer})
    assert found.newest == newer
    assert [(lag.vios, lag.contradicts) for lag in found.lagging] == [("one", False)]


def test_the_later_owner_wins_over_a_higher_revision(two_vios: Definition) -> None:
    base = rules.add_client(two_vios, "vm1", memory_bytes=MIB, hypervisor="host")
    cut_off = rules.add_client(base, "vm2", memory_bytes=MIB, hypervisor="host")
    cut_off = rules.add_client(cut_off, "vm3", memory_bytes=MIB, hypervisor="host")
    taken_over = rules.raise_epoch(base, "vm1")
    assert cut_off.revision > taken_over.revision
    found = compare({"one": cut_off, "two": taken_over})
    assert found.newest == taken_over
    assert [(lag.vios, lag.contradicts) for lag in found.lagging] == [("one", True)]


def test_everybody_chooses_alike_between_contradictions(two_vios: Definition) -> None:
    one = rules.add_client(two_vios, "vm1", memory_bytes=MIB, hypervisor="host")
    other = rules.add_client(two_vios, "vm2", memory_bytes=MIB, hypervisor="host")
    assert is_newer(one, other) != is_newer(other, one)
    assert compare({"a": one, "b": other}).newest == compare({"a": other, "b": one}).newest


def test_there_must_be_something_to_compare() -> None:
    with pytest.raises(ValueError, match="no definitions"):
        compare({})


def test_a_difference_names_the_field(two_vios: Definition) -> None:
    before = rules.add_client(two_vios, "vm1", memory_bytes=MIB, hypervisor="host")
    after = rules.raise_epoch(before, "vm1", 5)
    assert diff(before, after) == ("clients[vm1].epoch: 3 -> 5",)
    assert diff(two_vios, before) == ("clients[vm1]: added",)
    assert diff(before, two_vios) == ("clients[vm1]: removed",)


class Definitions(RuleBasedStateMachine):
    """Any order of changes leaves a sound document whose revision rises with each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.definition = Definition()
        self.history: list[Definition] = []

    def apply(self, changed: Definition) -> None:
        if changed is self.definition:
            return
        assert changed.revision > self.definition.revision
        self.history.append(self.definition)
        self.definition = changed

    @rule(
        name=st.sampled_from(["one", "two", "three"]),
        devices=st.sets(st.integers(0, 3)),
    )
    def register(self, name: str, devices: set[int]) -> None:
        here = [found(str(uuid.UUID(int=number)), f"d{number}", (number + 1) * MIB) for number in devices]
        self.apply(rules.register_vios(self.definition, name, vios(name), here))

    @rule(
        name=st.sampled_from(["vm1", "vm2", "vm3", "vm4"]),
        pages=st.integers(1, 600),
        redundancy=st.sampled_from([Redundancy.NONE, Redundancy.PATH]),
        vios_redundancy=st.sampled_from(ViosRedundancy),
    )
    def add(self, name: str, pages: int, redundancy: Redundancy, vios_redundancy: ViosRedundancy) -> None:
        before = self.definition
        try:
            self.apply(
                rules.add_client(
                    before,
                    name,
                    memory_bytes=pages * 4096,
                    hypervisor="host",
                    redundancy=redundancy,
                    vios_redundancy=vios_redundancy,
                )
            )
        except (ClientExists, NoDeviceFits):
            assert self.definition is before

    @precondition(lambda self: self.definition.clients)
    @rule(data=st.data())
    def raise_or_remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.definition.clients)))
        if data.draw(st.booleans()):
            self.apply(rules.raise_epoch(self.definition, name))
        else:
            self.apply(rules.remove_client(self.definition, name))

    @invariant()
    def is_sound(self) -> None:
        try:
            rules.check(self.definition)
        except InvalidDefinition as error:
            raise AssertionError(error.problems) from error
        assert Definition.model_validate_json(canonical_json(self.definition)) == self.definition

    @invariant()
    def is_the_newest_of_its_history(self) -> None:
        versions = {f"v{number}": version for number, version in enumerate(self.history[-3:])}
        assert compare({**versions, "now": self.definition}).newest.revision == self.definition.revision


TestDefinitions = Definitions.TestCase
TestDefinitions.settings = settings(max_examples=60, stateful_step_count=20)


def test_errors_are_for_users() -> None:
    for error in (
        ClientExists("vm1"),
        NoDeviceFits("vm1", 1, "a is full"),
        DeviceMismatch(A, "one", "x", "y"),
    ):
        assert isinstance(error, FarpageError)
        assert error.advice
