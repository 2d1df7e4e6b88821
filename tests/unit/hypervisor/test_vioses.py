from __future__ import annotations

from typing import Any, cast

import pytest

from farpage.api.client import ControlClient
from farpage.device.spec import Allocate
from farpage.errors import Unreachable
from farpage.hypervisor.vioses import NEW_VOLUME_BYTES_PER_SECOND, TIMEOUT_SECONDS, Vios
from farpage.vios.model import DeviceInfo, Health, VolumeCreate

DEVICE = "9ebffa09-bce1-473f-badc-f9a816dadf33"
SIZE = 100 * NEW_VOLUME_BYTES_PER_SECOND

HEALTH = Health(
    vios="vios1",
    version="1",
    pid=1,
    uptime_seconds=1.0,
    definition_revision=1,
    data=(),
    devices=1,
    open_exports=0,
    lease_seconds=5.0,
    leases=0,
)


def disk(allocate: Allocate = Allocate.SPARSE) -> DeviceInfo:
    return DeviceInfo(
        id=DEVICE,
        name="disk",
        kind="dir",
        spec="dir:/disk",
        access="direct",
        allocate=allocate,
        size_bytes=SIZE,
        provisioned_bytes=0,
        used_bytes=0,
        volumes=0,
        commands=(),
    )


class Client:
    """What answers as it is told, and notes how long its caller would wait."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.answers: dict[str, Any] = {"/v1/health": HEALTH, "/v1/devices": (disk(),)}

    async def look(self, path: str, _answer: Any) -> Any:
        if path not in self.answers:
            raise Unreachable("VIOS vios1", "unix:/run/vios1", "no answer", "check that it runs")
        return self.answers[path]

    async def post(self, *_request: Any, timeout_seconds: float) -> None:
        self.waits.append(timeout_seconds)


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def vios(client: Client) -> Vios:
    made = Vios("vios1", "unix:/run/vios1")
    made.client = cast(ControlClient, client)
    return made


@pytest.mark.parametrize(
    ("allocate", "seconds"), [(Allocate.SPARSE, TIMEOUT_SECONDS), (Allocate.FULL, TIMEOUT_SECONDS + 100)]
)
async def test_a_vios_is_given_the_time_to_write_a_new_volume_where_its_device_allocates_it_in_full(
    client: Client, vios: Vios, allocate: Allocate, seconds: float
) -> None:
    vios.devices = (disk(allocate),)
    await vios.create_volume(VolumeCreate(name="vm1", device=DEVICE, size_bytes=SIZE))
    assert client.waits == [seconds]


async def test_a_vios_that_does_not_list_its_devices_answers_and_has_those_that_it_told(
    client: Client, vios: Vios
) -> None:
    assert await vios.ask()
    del client.answers["/v1/devices"]
    assert not await vios.ask()
    assert vios.reachable
    assert vios.devices == (disk(),)


async def test_what_a_vios_reaches_that_has_never_listed_its_devices_is_not_known(
    client: Client, vios: Vios
) -> None:
    del client.answers["/v1/devices"]
    assert await vios.ask()
    assert vios.reachable
    assert not vios.listed


async def test_a_vios_of_another_name_is_not_used(client: Client) -> None:
    misnamed = Vios("v1", "unix:/run/vios1")
    misnamed.client = cast(ControlClient, client)
    assert not await misnamed.ask()
    assert misnamed.problem == "the VIOS at unix:/run/vios1 is called 'vios1': name it so in --vios"
    assert (misnamed.reachable, misnamed.listed) == (False, False)
