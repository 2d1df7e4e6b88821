"""Page tables of released clients at a VIOS."""

from __future__ import annotations

import numpy as np
import pytest

from farpage.api.remote import RemoteError
from farpage.handover import Handover, encode
from farpage.vios.model import HandoverInfo, VolumeOpen
from tests.support.vios import ViosProcess

OWNER = "0123456789abcdef"
PAGES = 256


def table(volume: str, on_device_pages: int = 100, attempt: int = 1) -> bytes:
    on_device = np.arange(PAGES) < on_device_pages
    checksums = np.where(on_device, np.arange(PAGES, dtype=np.uint32), np.uint32(0))
    return encode(Handover(volume, 5, attempt, on_device, np.zeros(PAGES, np.bool_), checksums))


async def put(
    vios: ViosProcess, volume: str, encoded: bytes, epoch: int = 5, owner: str = OWNER
) -> HandoverInfo:
    async with vios.client() as client:
        params: dict[str, str | int] = {"epoch": epoch, "owner": owner}
        return await client.put(f"/v1/volumes/{volume}/handover", encoded, HandoverInfo, params=params)


async def stored(vios: ViosProcess, volume: str) -> bytes:
    async with vios.client() as client:
        return await client.request("GET", f"/v1/volumes/{volume}/handover")


async def refused(vios: ViosProcess, volume: str, encoded: bytes, epoch: int = 5, owner: str = OWNER) -> str:
    with pytest.raises(RemoteError) as caught:
        await put(vios, volume, encoded, epoch, owner)
    return str(caught.value.code)


async def claimed(vios: ViosProcess, volume: str) -> None:
    await vios.create(volume)
    async with vios.client() as client:
        await client.request("POST", f"/v1/volumes/{volume}/open", body=VolumeOpen(epoch=5, owner=OWNER))


async def test_a_handover_is_stored_beside_its_volume_and_survives_the_end_of_the_vios(
    pair: tuple[ViosProcess, ...],
) -> None:
    vios, other = pair
    await claimed(vios, "kept")
    info = await put(vios, "kept", table("kept"))
    assert (info.volume, info.epoch, info.pages, info.on_device_pages) == ("kept", 5, PAGES, 100)
    await put(vios, "kept", table("kept", 50))
    vios.kill()
    vios.start()
    assert await stored(vios, "kept") == table("kept", 50)
    with pytest.raises(RemoteError) as caught:
        await stored(other, "kept")
    assert caught.value.code == "handover_not_found"


async def test_what_is_damaged_too_long_or_of_another_volume_is_refused(vios: ViosProcess) -> None:
    await claimed(vios, "picky")
    good = table("picky")
    assert await refused(vios, "picky", good[:-1]) == "handover_damaged"
    assert await refused(vios, "picky", bytes([*good[:-1], good[-1] ^ 1])) == "handover_damaged"
    assert await refused(vios, "picky", table("other")) == "handover_damaged"
    with pytest.raises(RemoteError, match="longer than 1240 bytes") as caught:
        await put(vios, "picky", bytes(100_000))
    assert caught.value.http_status == 413
    assert await refused(vios, "ghost", good) == "volume_not_found"


async def test_only_the_owner_at_the_newest_epoch_stores_or_forgets_one(vios: ViosProcess) -> None:
    await claimed(vios, "owned")
    await put(vios, "owned", table("owned"))
    assert await refused(vios, "owned", table("owned", 3), epoch=4) == "stale_epoch"
    assert await refused(vios, "owned", table("owned", 3), owner="f" * 16) == "another_owner"
    async with vios.client() as client:
        path = "/v1/volumes/owned/handover"
        with pytest.raises(RemoteError, match="epoch"):
            await client.delete(path, params={"epoch": 4, "owner": OWNER})
        assert await stored(vios, "owned") == table("owned")
        await client.delete(path, params={"epoch": 5, "owner": OWNER})
        await client.delete(path, params={"epoch": 5, "owner": OWNER})
    with pytest.raises(RemoteError):
        await stored(vios, "owned")


async def test_one_that_comes_late_from_a_release_that_was_given_up_does_not_replace_a_later_one(
    vios: ViosProcess,
) -> None:
    await claimed(vios, "late")
    await put(vios, "late", table("late", attempt=2))
    assert await refused(vios, "late", table("late", 3, attempt=1)) == "handover_outdated"
    assert await stored(vios, "late") == table("late", attempt=2)
    await put(vios, "late", table("late", 3, attempt=3))
    assert await stored(vios, "late") == table("late", 3, attempt=3)
    async with vios.client() as client:
        await client.delete("/v1/volumes/late", params={"epoch": 5})


async def test_a_handover_goes_with_its_volume(vios: ViosProcess) -> None:
    await claimed(vios, "gone")
    await put(vios, "gone", table("gone"))
    async with vios.client() as client:
        await client.delete("/v1/volumes/gone", params={"epoch": 5})
    assert not list((vios.folder / "one" / "handovers").iterdir())
    await vios.create("gone")
    with pytest.raises(RemoteError) as caught:
        await stored(vios, "gone")
    assert caught.value.code == "handover_not_found"
