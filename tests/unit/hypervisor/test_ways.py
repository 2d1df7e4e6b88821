from __future__ import annotations

import pytest

from farpage.definition import moving
from farpage.definition.errors import DeviceMissing
from farpage.hypervisor.ways import Way, explain
from farpage.volume.resolve import Place, Viewpoint
from tests.unit.volume.test_resolve import FIRST, IN_SYNC, SECOND, definition


def test_direct_access_is_said_with_its_device_and_vioses() -> None:
    shown = explain(definition((FIRST, IN_SYNC)), "vm1", "", Viewpoint({"vios1", "vios2"}))
    assert shown.way is Way.DIRECT
    assert shown.summary == "direct access to device one, whose replica is in_sync, over VIOS vios1, vios2"
    assert (shown.first_device, shown.first_vioses) == ("one", ("vios1", "vios2"))


def test_a_copy_that_the_hypervisor_can_make_itself_is_direct() -> None:
    shown = explain(definition((SECOND, IN_SYNC)), "vm1", "one", Viewpoint({"vios1", "vios3"}))
    assert shown.way is Way.DIRECT
    assert "can copy it there itself" in shown.summary
    assert (shown.to, shown.first_device, shown.first_vioses) == ("one", "one", ("vios1",))
    assert (shown.second_device, shown.second_vioses) == ("two", ("vios3",))


def test_indirect_access_says_where_an_intermediate_client_can_run() -> None:
    before = definition((SECOND, IN_SYNC))
    shown = explain(before, "vm1", FIRST, Viewpoint({"vios1"}))
    assert (shown.way, shown.under_way) == (Way.INDIRECT, False)
    assert "can be moved to device one over VIOS vios1" in shown.summary
    assert shown.intermediate is not None
    assert shown.intermediate.place is Place.ANYWHERE
    route = moving.Route(SECOND, "vios3", FIRST, "vios1")
    moved = moving.begin(before, "vm1", moving.Claim("", 0), route, "0" * 16)
    shown = explain(moved, "vm1", "", Viewpoint({"vios1"}))
    assert shown.under_way
    assert "is being moved to device one" in shown.summary


def test_no_way_says_what_is_missing_and_names_devices_as_users_do() -> None:
    shown = explain(definition((FIRST, IN_SYNC)), "vm1", "two", Viewpoint({"vios1"}))
    assert shown.way is Way.UNREACHABLE
    assert shown.summary == "no way: " + "; ".join(shown.reasons)
    assert {edge.device for edge in shown.edges} == {"one", "two", "three"}
    with pytest.raises(DeviceMissing, match="one, three, two"):
        explain(definition((FIRST, IN_SYNC)), "vm1", "four", Viewpoint({"vios1"}))
