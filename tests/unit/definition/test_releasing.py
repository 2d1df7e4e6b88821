"""A client that goes from one hypervisor to another, in the definition."""

from __future__ import annotations

from itertools import pairwise

import pytest

from farpage.definition import releasing, rules
from farpage.definition.compare import is_newer
from farpage.definition.errors import NotTheOwner
from farpage.definition.model import ClientRecord, Definition, Release
from tests.unit.definition.test_definition_rules import MIB, B, defined, found

ONE, TWO, THREE = ("1" * 16, "2" * 16, "3" * 16)
RELEASE = Release(hypervisor="host", epoch=9, digest="ab" * 32)


def attached() -> Definition:
    """Client vm1, claimed by ONE at hypervisor `host`."""
    devices = defined(one=[found(B, "b", 2 * MIB)], two=[found(B, "b", 2 * MIB)])
    made = rules.add_client(devices, "vm1", memory_bytes=MIB, hypervisor="host")
    return rules.claim(made, "vm1", ONE, "host")


def released() -> Definition:
    return releasing.release(attached(), "vm1", ONE, 9, RELEASE)


def record(definition: Definition) -> ClientRecord:
    return definition.clients["vm1"]


def test_a_client_goes_to_another_hypervisor_in_steps_each_newer_than_the_one_before() -> None:
    steps = [attached(), released()]
    steps.append(releasing.adopt(steps[-1], "vm1", TWO, "other", 20))
    steps.append(rules.claim(steps[-1], "vm1", THREE, "other"))
    assert all(is_newer(after, before) for before, after in pairwise(steps))
    assert [(s.hypervisor, s.owner, s.epoch) for s in map(record, steps[1:])] == [
        ("host", ONE, 9),
        ("other", TWO, 20),
        ("other", THREE, 21),
    ]
    adopted = RELEASE.model_copy(update={"adopter": "other"})
    assert [s.released for s in map(record, steps)] == [None, RELEASE, adopted, None]


def test_only_who_has_a_client_releases_it() -> None:
    with pytest.raises(NotTheOwner):
        releasing.release(attached(), "vm1", TWO, 9, RELEASE)


def test_a_client_that_somebody_has_is_not_adopted() -> None:
    with pytest.raises(releasing.ClientNotReleased, match="hypervisor 'host' has it"):
        releasing.adopt(attached(), "vm1", TWO, "other")


def test_one_hypervisor_adopts_a_client_and_another_one_only_by_force() -> None:
    adopted = releasing.adopt(released(), "vm1", TWO, "other")
    assert record(releasing.adopt(adopted, "vm1", THREE, "other")).owner == THREE
    with pytest.raises(releasing.ClientReleased, match="and adopted by 'other'") as caught:
        releasing.adopt(adopted, "vm1", THREE, "third")
    assert "farpage client adopt vm1 --force" in caught.value.advice
    taken = record(releasing.adopt(adopted, "vm1", THREE, "third", force=True))
    assert taken.released is not None
    assert (taken.hypervisor, taken.released.adopter) == ("third", "third")


def test_a_release_that_could_not_be_finished_is_taken_back_unless_somebody_has_adopted_the_client() -> None:
    assert record(releasing.take_back(released(), "vm1", ONE)).released is None
    for kept in (releasing.adopt(released(), "vm1", TWO, "other"), attached()):
        assert releasing.take_back(kept, "vm1", TWO) is kept
    assert releasing.take_back(attached(), "ghost", ONE) == attached()


def test_an_attachment_that_has_changed_nothing_gives_the_release_back() -> None:
    adopted = releasing.adopt(released(), "vm1", TWO, "other")
    claimed = rules.claim(adopted, "vm1", THREE, "other")
    before = record(adopted).released
    assert before is not None
    assert record(releasing.restore(claimed, "vm1", THREE, before)).released == before
    with pytest.raises(NotTheOwner):
        releasing.restore(rules.claim(claimed, "vm1", ONE, "host"), "vm1", THREE, before)
