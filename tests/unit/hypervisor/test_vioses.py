from __future__ import annotations

from typing import Any, cast

import pytest

from farpage.api.client import ControlClient
from farpage.device.spec import Allocate
from farpage.hypervisor.vioses import NEW_VOLUME_BYTES_PER_SECOND, TIMEOUT_SECONDS, Vios
from farpage.vios.model import DeviceInfo, VolumeCreate

DEVICE = "9ebffa09-bce1-473f-badc-f9a816dadf33"
SIZE = 100 * NEW_VOLUME_BYTES_PER_SECOND


class Client:
    """What notes how long its caller would wait."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    async def post(self, *_request: Any, timeout_seconds: float) -> None:
        self.waits.append(timeout_seconds)


@pytest.mark.parametrize(
    ("allocate", "seconds"), [(Allocate.SPARSE, TIMEOUT_SECONDS), (Allocate.FULL, TIMEOUT_SECONDS + 100)]
)
async def test_a_vios_is_given_the_time_to_write_a_new_volume_where_its_device_allocates_it_in_full(
    allocate: Allocate, seconds: float
) -> None:
    client, vios = Client(), Vios("vios1", "unix:/run/vios1")
    vios.client = cast(ControlClient, client)
    vios.devices = (
        DeviceInfo(
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
        ),
    )
    await vios.create_volume(VolumeCreate(name="vm1", device=DEVICE, size_bytes=SIZE))
    assert client.waits == [seconds]
