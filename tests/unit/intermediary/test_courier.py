"""The courier between VIOS that store different definitions."""

from __future__ import annotations

import pytest

from farpage.address import TcpAddress, UnixAddress
from farpage.definition.model import Definition, ViosRecord
from farpage.intermediary.courier import Courier
from farpage.intermediary.places import data_addresses
from tests.support.places import StoredPlace
from tests.support.simulated_loop import run_simulated


def _definition(revision: int) -> Definition:
    vios = ViosRecord(control="unix:/c", data=("unix:/d",))
    return Definition(revision=revision, vioses={f"vios{revision}": vios})


@pytest.mark.parametrize("newer", [0, 1])
def test_the_newer_definition_is_brought_to_the_one_that_lags(newer: int) -> None:
    async def main() -> None:
        stores = [StoredPlace(f"v{number}", _definition(7 if number == newer else 3)) for number in range(2)]
        courier = Courier(stores)
        await courier.carry()
        assert [store.stored for store in stores] == [_definition(7)] * 2
        assert courier.newest == _definition(7)
        assert courier.carried == 1
        assert all(map(courier.has_newest, stores))
        await courier.carry()
        assert courier.carried == 1

    run_simulated(main)


def test_what_one_that_went_away_had_is_brought_by_and_by() -> None:
    async def main() -> None:
        first, second = StoredPlace("v1", _definition(7)), StoredPlace("v2", _definition(3))
        courier = Courier([first, second])
        second.away = True
        await courier.carry()
        assert (second.problem, courier.has_newest(second)) == (
            "v2 at unix:/nowhere/v2 does not answer: it is away",
            False,
        )
        first.away, second.away = True, False
        await courier.carry()
        assert second.stored == _definition(7)
        assert (second.problem, courier.has_newest(second)) == ("", True)

    run_simulated(main)


def test_a_change_between_reading_and_writing_is_not_overwritten() -> None:
    async def main() -> None:
        first, second = StoredPlace("v1", _definition(7)), StoredPlace("v2", _definition(3))
        courier = Courier([first, second])
        put = second.put

        async def late(expected_revision: int, definition: Definition) -> None:
            second.stored = _definition(8)
            await put(expected_revision, definition)

        second.put = late  # type: ignore[method-assign]
        await courier.carry()
        assert second.stored == _definition(8)
        await courier.carry()
        assert (first.stored, courier.newest) == (_definition(8), _definition(8))

    run_simulated(main)


def test_addresses_of_a_vios_are_those_that_its_control_address_makes_sense_of() -> None:
    record = ViosRecord(control="unix:/c", data=("unix:/d", "tcp:0.0.0.0:10809", "tcp:10.0.0.9:1"))
    assert data_addresses(record, "unix:/c") == (
        UnixAddress("/d"),
        TcpAddress("127.0.0.1", 10809),
        TcpAddress("10.0.0.9", 1),
    )
