from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from farpage.api.remote import RemoteError
from farpage.definition.document import canonical_json
from farpage.definition.model import Definition, PagingCommand, ViosRecord
from farpage.definition.rules import (
    FoundDevice,
    add_client,
    claim,
    next_revision,
    raise_epoch,
    register_vios,
    remove_client,
)
from farpage.errors import ExitStatus
from farpage.nbd.errors import ServerRefused
from farpage.vios.model import DeviceAdd, DeviceInfo, Health, VolumeCreate, VolumeInfo
from tests.support.vios import ViosProcess
from tests.support.volumes import write

MIB = 1 << 20
ANNA, BERT = "00000000000000aa", "00000000000000bb"


async def definition_of(vios: ViosProcess) -> Definition:
    async with vios.client() as client:
        return await client.get("/v1/definition", Definition)


async def put(vios: ViosProcess, expected_revision: int, definition: Definition) -> Definition:
    async with vios.client() as client:
        return await client.put(
            "/v1/definition", definition, Definition, params={"expected_revision": expected_revision}
        )


async def with_client(vios: ViosProcess, name: str) -> Definition:
    """Register the VIOS and its device as it is, add a client and store that."""
    device = await vios.device()
    current = await definition_of(vios)
    found = FoundDevice(device.id, device.name, device.kind, device.spec, device.size_bytes, device.commands)
    record = ViosRecord(control=vios.control, data=(str(vios.data),))
    wanted = add_client(
        register_vios(current, "one", record, [found]), name, memory_bytes=MIB, hypervisor="host"
    )
    return await put(vios, current.revision, wanted)


async def test_health_tells_who_and_how(vios: ViosProcess) -> None:
    async with vios.client() as client:
        health = await client.get("/v1/health", Health)
    assert (health.vios, health.pid, health.devices) == ("one", vios.pid, 1)
    assert health.data == (str(vios.data),)


async def test_a_device_tells_what_it_is_and_takes(vios: ViosProcess) -> None:
    device = await vios.device()
    assert device.name == "disk"
    assert device.size_bytes == 256 * MIB
    assert device.commands == tuple(PagingCommand)
    assert device.access in {"direct", "buffered, page cache dropped"}


async def test_a_volume_is_made_shown_and_deleted(vios: ViosProcess) -> None:
    made = await vios.create("made")
    assert (made.name, made.size_bytes, made.epoch, made.open_connections) == ("made", MIB, 0, 0)
    async with vios.client() as client:
        assert made in await client.get("/v1/volumes", tuple[VolumeInfo, ...])
        await client.delete("/v1/volumes/made")
        with pytest.raises(RemoteError) as caught:
            await client.get("/v1/volumes/made", VolumeInfo)
    assert caught.value.code == "volume_not_found"
    assert caught.value.exit_status is ExitStatus.NOT_FOUND


async def test_refusals_say_which_field_is_wrong_and_change_nothing(vios: ViosProcess) -> None:
    device = (await vios.device()).id
    async with vios.client() as client:
        before = await client.get("/v1/volumes", tuple[VolumeInfo, ...])

        async def refused(method: str, path: str, body: dict[str, Any] | None = None) -> RemoteError:
            content = None if body is None else json.dumps(body)
            answer = await client._http.request(
                method, path, content=content, headers={"content-type": "application/json"}
            )
            assert answer.status_code >= 400
            error = answer.json()["error"]
            assert error["remedy"]
            return RemoteError(
                answer.status_code, error["code"], error["message"], error["remedy"], error["details"]
            )

        good = {"name": "v", "device": device, "size_bytes": MIB}
        for change, field in (
            ({"name": "../etc"}, "name"),
            ({"name": "A"}, "name"),
            ({"size_bytes": 4097}, "size_bytes"),
            ({"size_bytes": -4096}, "size_bytes"),
            ({"size_bytes": 1 << 80}, "size_bytes"),
            ({"size_bytes": None}, "size_bytes"),
            ({"device": "disk"}, "device"),
            ({"colour": "red"}, "colour"),
        ):
            error = await refused("POST", "/v1/volumes", {**good, **change})
            assert (error.http_status, error.details["field"]) == (422, field)
        assert (
            await refused("POST", "/v1/volumes", {**good, "device": str(uuid.uuid4())})
        ).http_status == 404
        assert (
            await refused("POST", "/v1/volumes", {**good, "size_bytes": 1 << 40})
        ).code == "capacity_exceeded"
        assert (await refused("GET", "/v1/volumes/NO")).details["field"] == "name"
        assert (await refused("DELETE", "/v1/volumes/ghost")).http_status == 404
        assert (await refused("DELETE", "/v1/volumes/ghost?epoch=0")).details["field"] == "epoch"
        assert (await refused("POST", "/v1/volumes/ghost/open", {"epoch": 1})).http_status == 404
        assert (await refused("POST", "/v1/volumes/ghost/open", {"epoch": 0})).details["field"] == "epoch"
        assert (await refused("POST", "/v1/devices", {"spec": "disk:/x"})).details["field"] == "device"
        assert (await refused("POST", "/v1/devices", {"spec": "dir:/proc/x/y"})).code == "device_unusable"
        assert (await refused("PUT", "/v1/definition", {})).details["field"] == "expected_revision"
        assert (await refused("PUT", "/v1/definition?expected_revision=0", {"format": 2})).http_status == 422
        assert await client.get("/v1/volumes", tuple[VolumeInfo, ...]) == before


async def test_a_name_is_taken_once(vios: ViosProcess) -> None:
    await vios.create("twice")
    with pytest.raises(RemoteError) as caught:
        await vios.create("twice")
    assert caught.value.code == "volume_exists"


async def test_a_volume_in_use_is_deleted_only_under_its_owner_s_epoch(vios: ViosProcess) -> None:
    await vios.create("used")
    connection = await vios.connect("used@5")
    async with vios.client() as client:
        with pytest.raises(RemoteError, match="1 connections here"):
            await client.delete("/v1/volumes/used")
        with pytest.raises(RemoteError, match="epoch 4 is older than epoch 5"):
            await client.delete("/v1/volumes/used", params={"epoch": 4})
        assert await write(connection, 0, b"x" * 4096) == 0
        await client.delete("/v1/volumes/used", params={"epoch": 5})
        with pytest.raises(RemoteError):
            await client.get("/v1/volumes/used", VolumeInfo)
    await connection.close()


async def test_a_volume_made_anew_does_not_inherit_the_epoch(vios: ViosProcess) -> None:
    await vios.create("anew")
    await vios.claim("anew", 9)
    async with vios.client() as client:
        await client.delete("/v1/volumes/anew", params={"epoch": 9})
    await vios.create("anew")
    assert (await vios.claim("anew", 1)).epoch == 1


async def test_claiming_raises_the_epoch_and_never_lowers_it(vios: ViosProcess) -> None:
    await vios.create("claimed")
    assert (await vios.claim("claimed", 3)).epoch == 3
    assert (await vios.claim("claimed", 3)).epoch == 3
    with pytest.raises(RemoteError) as caught:
        await vios.claim("claimed", 2)
    assert (caught.value.http_status, caught.value.code) == (409, "stale_epoch")
    assert caught.value.details["current"] == 3
    assert (await vios.volume("claimed")).epoch == 3


async def test_a_device_added_twice_is_served_once(vios: ViosProcess, tmp_path: Path) -> None:
    wanted = DeviceAdd(spec=f"dir:{tmp_path}/second?size=8M", name="second")
    async with vios.client() as client:
        first = await client.post("/v1/devices", wanted, DeviceInfo)
        again = await client.post("/v1/devices", wanted, DeviceInfo)
        other = await client.post("/v1/devices", DeviceAdd(spec=f"dir:{tmp_path}/second"), DeviceInfo)
        devices = await client.get("/v1/devices", tuple[DeviceInfo, ...])
    assert first == again == other
    assert [device.id for device in devices].count(first.id) == 1


async def test_a_directory_that_is_in_use_needs_force(vios: ViosProcess, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    async with vios.client() as client:
        with pytest.raises(RemoteError, match="photo"):
            await client.post("/v1/devices", DeviceAdd(spec=f"dir:{tmp_path}?size=8M"), DeviceInfo)
        forced = DeviceAdd(spec=f"dir:{tmp_path}?size=8M", force=True)
        assert (await client.post("/v1/devices", forced, DeviceInfo)).size_bytes == 8 * MIB


async def test_volumes_made_at_once_stay_within_the_capacity(vios: ViosProcess) -> None:
    async with vios.client() as client:
        device = await client.post("/v1/devices", DeviceAdd(spec="memory:8M", name="small"), DeviceInfo)
        wanted = [VolumeCreate(name=f"m{number}", device=device.id, size_bytes=MIB) for number in range(12)]
        made = await asyncio.gather(
            *(client.post("/v1/volumes", volume, VolumeInfo) for volume in wanted), return_exceptions=True
        )
    assert sum(isinstance(answer, VolumeInfo) for answer in made) == 8


async def test_the_definition_is_stored_in_its_canonical_form(vios: ViosProcess) -> None:
    stored = await with_client(vios, "canonical")
    async with vios.client() as client:
        assert (await client.request("GET", "/v1/definition")).decode() == canonical_json(stored)
        assert (await client.get("/v1/health", Health)).definition_revision == stored.revision


async def test_of_two_writers_one_gets_a_conflict_with_the_current_revision(vios: ViosProcess) -> None:
    current = await definition_of(vios)
    rivals = [
        next_revision(
            current, vioses={**current.vioses, name: ViosRecord(control="unix:/c", data=("unix:/d",))}
        )
        for name in ("rival-a", "rival-b")
    ]
    answers = await asyncio.gather(
        *(put(vios, current.revision, rival) for rival in rivals), return_exceptions=True
    )
    refused = [answer for answer in answers if isinstance(answer, RemoteError)]
    assert len(refused) == 1
    assert (refused[0].http_status, refused[0].details["current_revision"]) == (409, current.revision + 1)
    assert await definition_of(vios) in rivals


async def test_a_definition_that_contradicts_itself_changes_nothing(vios: ViosProcess) -> None:
    before = await with_client(vios, "sound")
    volume = before.clients["sound"].volumes[0]
    broken = before.model_copy(
        update={
            "revision": before.revision + 1,
            "clients": {
                **before.clients,
                "copy": before.clients["sound"].model_copy(update={"volumes": (volume,)}),
            },
        }
    )
    with pytest.raises(RemoteError, match="used twice") as caught:
        await put(vios, before.revision, broken)
    assert caught.value.http_status == 422
    assert await definition_of(vios) == before


async def test_a_definition_shuts_those_out_who_lose_a_volume_and_lets_owners_with_a_newer_epoch_go_on(
    vios: ViosProcess,
) -> None:
    await with_client(vios, "kept")
    definition = await with_client(vios, "taken")
    for volume in ("kept", "taken"):
        definition = await put(vios, definition.revision, claim(definition, volume, ANNA, "host"))
        await vios.create(volume)
    epochs = {volume: definition.clients[volume].epoch for volume in ("kept", "taken")}
    kept, taken = [await vios.connect(f"{volume}@{epoch}:{ANNA}") for volume, epoch in epochs.items()]
    changed = claim(raise_epoch(definition, "kept"), "taken", BERT, "other")
    await put(vios, definition.revision, changed.model_copy(update={"revision": definition.revision + 1}))
    async with asyncio.timeout(60):
        while await write(taken, 0, b"x" * 4096) == 0:
            await asyncio.sleep(0.001)
    assert await write(kept, 0, b"x" * 4096) == 0
    with pytest.raises(ServerRefused, match="is older"):
        await vios.connect(f"kept@{epochs['kept']}:{ANNA}")
    await kept.close()
    await taken.close()


async def test_a_newer_epoch_in_the_definition_shuts_out_an_owner_without_a_token(vios: ViosProcess) -> None:
    before = await with_client(vios, "moved")
    epoch = before.clients["moved"].epoch
    await vios.create("moved")
    connection = await vios.connect(f"moved@{epoch}")
    assert await write(connection, 0, b"x" * 4096) == 0
    await put(vios, before.revision, raise_epoch(before, "moved"))
    # In the background: a claim of the same epoch is answered when it is through.
    await vios.claim("moved", epoch + 1)
    assert await write(connection, 0, b"y" * 4096) != 0
    with pytest.raises(RemoteError, match=f"epoch {epoch} is older"):
        await vios.claim("moved", epoch)
    await connection.close()


async def test_a_client_s_volume_is_not_deleted_by_accident(vios: ViosProcess) -> None:
    definition = await with_client(vios, "owned")
    epoch = definition.clients["owned"].epoch
    await vios.create("owned")
    async with vios.client() as client:
        with pytest.raises(RemoteError) as caught:
            await client.delete("/v1/volumes/owned")
        assert caught.value.code == "volume_owned"
        await put(vios, definition.revision, remove_client(definition, "owned"))
        await client.delete("/v1/volumes/owned")
    assert epoch > 0


async def test_metrics_are_in_prometheus_format(vios: ViosProcess) -> None:
    await vios.create("measured")
    connection = await vios.connect("measured@1")
    assert await write(connection, 0, b"x" * 8192) == 0
    async with vios.client() as client:
        text = (await client.request("GET", "/metrics")).decode()
    await connection.close()
    assert 'farpage_volume_written_bytes_total{volume="measured"} 8192.0' in text
    assert 'farpage_device_usable{device="disk"} 1.0' in text
    assert 'farpage_device_reconnects_total{device="disk"} 0.0' in text


async def test_the_description_names_every_request(vios: ViosProcess) -> None:
    async with vios.client() as client:
        description = json.loads(await client.request("GET", "/openapi.json"))
    requests = {
        f"{method.upper()} {path}" for path, methods in description["paths"].items() for method in methods
    }
    assert requests == {
        "GET /v1/health",
        "POST /v1/stop",
        "GET /v1/devices",
        "POST /v1/devices",
        "GET /v1/volumes",
        "POST /v1/volumes",
        "GET /v1/volumes/{name}",
        "DELETE /v1/volumes/{name}",
        "POST /v1/volumes/{name}/open",
        "PUT /v1/volumes/{name}/handover",
        "GET /v1/volumes/{name}/handover",
        "DELETE /v1/volumes/{name}/handover",
        "PUT /v1/volumes/{name}/intermediary",
        "GET /v1/volumes/{name}/copy",
        "GET /v1/definition",
        "PUT /v1/definition",
        "GET /metrics",
    }
