from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from farpage.blockio import Feature, read_bytes
from farpage.definition.model import Definition, PagingCommand, ViosRecord
from farpage.definition.rules import FoundDevice, next_revision, register_vios
from farpage.nbd.client import Connection, list_exports
from farpage.nbd.errors import ServerRefused
from tests.support.vios import ViosProcess, vios_processes
from tests.support.volumes import extents, flush, trim, write, zero

ANNA, BERT = "00000000000000aa", "00000000000000bb"


async def test_an_owner_reads_what_it_wrote(vios: ViosProcess) -> None:
    await vios.create("rw")
    connection = await vios.connect("rw@1")
    content = os.urandom(100_000)
    assert await write(connection, 5000, content, fua=True) == 0
    assert await read_bytes(connection, 5000, 100_000) == content
    assert await zero(connection, 5000, 4096) == 0
    assert await trim(connection, 65536, 16384) == 0
    assert await flush(connection) == 0
    assert (await extents(connection, 0, 1 << 20))[0] == 0
    assert await read_bytes(connection, 5000, 4096) == bytes(4096)
    await connection.close()


async def test_several_connections_of_one_owner_share_the_volume(vios: ViosProcess) -> None:
    await vios.create("shared")
    one, other = await vios.connect("shared@1"), await vios.connect("shared@1")
    assert Feature.MULTI_CONN in one.features
    assert await write(one, 0, b"a" * 4096) == 0
    assert await flush(one) == 0
    assert await read_bytes(other, 0, 4096) == b"a" * 4096
    assert (await vios.volume("shared")).open_connections == 2
    await one.close()
    await other.close()


async def test_without_an_epoch_it_is_a_read_only_view_of_what_is_there(vios: ViosProcess) -> None:
    await vios.create("viewed")
    owner, view = await vios.connect("viewed@1"), await vios.connect("viewed")
    assert view.read_only
    assert await write(owner, 0, b"a" * 4096) == 0
    assert await read_bytes(view, 0, 4096) == b"a" * 4096
    assert await write(view, 0, b"b" * 4096) == errno.EPERM
    # A reader does not own anything, so a newer owner leaves it alone.
    await vios.claim("viewed", 2)
    assert await read_bytes(view, 0, 4096) == b"a" * 4096
    await owner.close()
    await view.close()


async def test_an_older_epoch_is_refused_naming_both(vios: ViosProcess) -> None:
    await vios.create("older")
    newer = await vios.connect("older@7")
    with pytest.raises(ServerRefused, match="epoch 6 is older than epoch 7"):
        await vios.connect("older@6")
    assert await write(newer, 0, b"a" * 4096) == 0
    await newer.close()


async def test_a_second_writer_with_a_newer_epoch_cuts_the_first_off(vios: ViosProcess) -> None:
    await vios.create("second")
    first = await vios.connect("second@1")
    assert await write(first, 0, b"a" * 4096) == 0
    second = await vios.connect("second@2")
    assert await write(first, 0, b"b" * 4096) != 0
    assert await read_bytes(second, 0, 4096) == b"a" * 4096
    await first.close()
    await second.close()


@pytest.mark.parametrize("export", ["ghost@1", "ghost", "", "@", "a@b@c", "x" * 200, "../disk@1", "served@0"])
async def test_unknown_and_malformed_exports_are_refused_while_others_are_served(
    vios: ViosProcess, export: str
) -> None:
    name = f"served-{abs(hash(export))}"
    await vios.create(name)
    served = await vios.connect(f"{name}@1")
    with pytest.raises(ServerRefused):
        await vios.connect(export)
    assert await write(served, 0, b"a" * 4096) == 0
    await served.close()


async def test_listing_shows_the_volumes(vios: ViosProcess) -> None:
    await vios.create("listed")
    assert ("listed", "on device disk") in await list_exports(vios.data)


async def test_commands_that_the_definition_takes_away_are_not_offered(folder: Path) -> None:
    with vios_processes(folder, "one", devices=[f"dir:{folder}/disk?size=16M"]) as (vios,):
        device = await vios.device()
        await vios.create("limited")
        fewer = (PagingCommand.OPEN, PagingCommand.PAGE_IN, PagingCommand.PAGE_OUT, PagingCommand.CLOSE)
        found = FoundDevice(device.id, "disk", "dir", device.spec, device.size_bytes, fewer)
        record = ViosRecord(control=vios.control, data=(str(vios.data),))
        definition = register_vios(Definition(), "one", record, [found])
        async with vios.client() as client:
            params = {"expected_revision": 0}
            await client.put("/v1/definition", definition, Definition, params=params)
        assert (await vios.device()).commands == fewer
        connection = await vios.connect("limited@1")
        assert not connection.features & (Feature.TRIM | Feature.ZERO | Feature.FLUSH)
        assert await write(connection, 0, b"a" * 4096) == 0
        assert await trim(connection, 0, 4096) == errno.ENOTSUP
        assert await zero(connection, 0, 4096) == errno.ENOTSUP
        assert await read_bytes(connection, 0, 4096) == b"a" * 4096
        await connection.close()
        closed = next_revision(
            definition,
            devices={device.id: definition.devices[device.id].model_copy(update={"commands": fewer[1:]})},
        )
        async with vios.client() as client:
            params = {"expected_revision": definition.revision}
            await client.put("/v1/definition", closed, Definition, params=params)
        with pytest.raises(ServerRefused, match="not configured"):
            await vios.connect("limited@1")


async def test_a_volume_that_the_other_vios_made_is_found_without_a_restart(
    pair: tuple[ViosProcess, ViosProcess],
) -> None:
    one, two = pair
    assert (await one.device()).id == (await two.device()).id
    await one.create("common")
    through_two = await two.connect("common@1")
    assert await write(through_two, 0, b"a" * 4096) == 0
    through_one = await one.connect("common@1")
    assert await read_bytes(through_one, 0, 4096) == b"a" * 4096
    await through_one.close()
    await through_two.close()


async def test_an_epoch_raised_through_one_vios_holds_for_the_other(
    pair: tuple[ViosProcess, ViosProcess],
) -> None:
    one, two = pair
    await one.create("vm1")
    old = await one.connect("vm1@1")
    assert await write(old, 0, b"a" * 4096) == 0
    await two.claim("vm1", 2)
    assert await write(old, 0, b"b" * 4096) == errno.ESHUTDOWN
    with pytest.raises(ServerRefused, match="epoch 1 is older than epoch 2"):
        await one.connect("vm1@1")
    assert (await one.volume("vm1")).epoch == 2
    await old.close()


async def test_of_owners_who_come_to_one_epoch_through_two_vios_one_is_let_in(
    pair: tuple[ViosProcess, ViosProcess],
) -> None:
    await pair[0].create("contested")
    for epoch in range(1, 6):
        names = [f"contested@{epoch}:{epoch:08x}{number:08x}" for number in range(6)]
        opened = await asyncio.gather(
            *(pair[number % 2].connect(name) for number, name in enumerate(names)), return_exceptions=True
        )
        winners = [connection for connection in opened if isinstance(connection, Connection)]
        assert len(winners) == 1
        for refusal in opened:
            assert isinstance(refusal, Connection) or f"another_owner {epoch}: " in str(refusal)
        for vios in pair:
            assert (await vios.volume("contested")).owner == winners[0].export_name.partition(":")[2]
        assert await write(winners[0], 0, bytes(4096)) == 0
        await winners[0].close()


async def test_an_owner_whom_another_has_replaced_stays_out_through_either_vios(
    pair: tuple[ViosProcess, ViosProcess],
) -> None:
    one, two = pair
    await one.create("replaced")
    old = await one.connect(f"replaced@5:{ANNA}")
    new = await two.connect(f"replaced@6:{BERT}")
    assert await write(old, 0, b"a" * 4096) == errno.ESHUTDOWN
    for vios in pair:
        for epoch in (5, 6, 7, 900):
            with pytest.raises(ServerRefused, match="another_owner 6: "):
                await vios.connect(f"replaced@{epoch}:{ANNA}")
            with pytest.raises(ServerRefused, match="another_owner 6: "):
                await vios.connect(f"replaced@{epoch}:{ANNA}", structured_replies=False)
    one.kill()
    one.start()
    with pytest.raises(ServerRefused, match="another_owner 6: "):
        await one.connect(f"replaced@900:{ANNA}")
    assert await write(new, 0, b"b" * 4096) == 0
    with pytest.raises(ServerRefused, match="stale_epoch 6: "):
        await one.connect(f"replaced@5:{BERT}")
    await (await one.connect(f"replaced@7:{BERT}")).close()
    await old.close()
    await new.close()


async def test_two_vios_that_provision_at_once_stay_within_the_capacity(
    pair: tuple[ViosProcess, ViosProcess],
) -> None:
    device = await pair[0].device()
    assert device.provisioned_bytes is not None
    free_bytes = device.size_bytes - device.provisioned_bytes
    made = await asyncio.gather(
        *(
            vios.create(f"{vios.name}-{number}", free_bytes // 5 // 4096 * 4096)
            for vios in pair
            for number in range(5)
        ),
        return_exceptions=True,
    )
    assert sum(not isinstance(answer, BaseException) for answer in made) == 5
    device = await pair[1].device()
    assert device.provisioned_bytes is not None
    assert device.provisioned_bytes <= device.size_bytes
