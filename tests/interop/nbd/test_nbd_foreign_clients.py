"""The programs of the field as clients of farpage's server."""

from __future__ import annotations

import filecmp
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from farpage.blockio import BlockLimits
from tests.support.blockio import MemoryIO
from tests.support.nbd import Serving, serving
from tests.support.tools import need, run, running

SIZE = 16 << 20
LIBNBD_SCRIPT = Path(__file__).with_name("libnbd_features.py")


@pytest.fixture(name="volume")
def _volume() -> MemoryIO:
    """Data in the first and the third quarter, holes elsewhere."""
    volume = MemoryIO(SIZE)
    chance = random.Random(5)
    for quarter in (0, 2):
        start = quarter * SIZE // 4
        volume.content[start : start + SIZE // 4] = chance.randbytes(SIZE // 4)
    return volume


@pytest.fixture(name="server")
async def _server(volume: MemoryIO) -> AsyncIterator[Serving]:
    async with serving({"v": volume, "empty": MemoryIO(1 << 20), "blocks": blocks()}) as serving_:
        yield serving_


def blocks() -> MemoryIO:
    return MemoryIO(SIZE, limits=BlockLimits(4096, 4096, 1 << 20))


def image(path: Path, seed: int = 9) -> Path:
    """Write a sparse image: half data, half hole."""
    with path.open("wb") as file:
        file.truncate(SIZE)
        for at in range(0, SIZE, 2 << 20):
            file.seek(at)
            file.write(random.Random(seed + at).randbytes(1 << 20))
    return path


async def test_nbdinfo_lists_the_exports(server: Serving) -> None:
    need("nbdinfo")
    listed = json.loads(await run("nbdinfo", "--list", "--json", server.uri("")))
    assert [export["export-name"] for export in listed["exports"]] == ["v", "empty", "blocks"]
    assert listed["exports"][0]["description"] == "volume v"


async def test_nbdinfo_reads_size_features_and_block_sizes(server: Serving) -> None:
    need("nbdinfo")
    shown = json.loads(await run("nbdinfo", "--json", server.uri("blocks")))
    (export,) = shown["exports"]
    assert shown["protocol"] == "newstyle-fixed"
    assert shown["structured"] is True
    assert export["export-size"] == SIZE
    assert export["contexts"] == ["base:allocation"]
    for feature in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{feature}"] is True, feature
    assert export["is_read_only"] is False
    assert (export["block_size_minimum"], export["block_size_preferred"], export["block_size_maximum"]) == (
        4096,
        4096,
        1 << 20,
    )


async def test_nbdinfo_maps_data_and_holes(server: Serving) -> None:
    need("nbdinfo")
    mapped = json.loads(await run("nbdinfo", "--map", "--json", server.uri("v")))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in mapped] == [
        (0, SIZE // 4, 0),
        (SIZE // 4, SIZE // 4, 3),
        (SIZE // 2, SIZE // 4, 0),
        (3 * SIZE // 4, SIZE // 4, 3),
    ]


async def test_nbdinfo_names_an_unknown_export(server: Serving) -> None:
    need("nbdinfo")
    output = await run("nbdinfo", server.uri("nothing"), fails=True)
    assert "No such file or directory for export: nothing" in output


async def test_nbdcopy_out_brings_every_byte(server: Serving, volume: MemoryIO, tmp_path: Path) -> None:
    need("nbdcopy")
    await run("nbdcopy", server.uri("v"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == volume.content


@pytest.mark.parametrize("options", [[], ["--connections=1", "--requests=1"], ["--destination-is-zero"]])
async def test_nbdcopy_in_brings_every_byte(
    server: Serving, volume: MemoryIO, tmp_path: Path, options: list[str]
) -> None:
    need("nbdcopy")
    if "--destination-is-zero" in options:
        volume.content[:] = bytes(SIZE)
    source = image(tmp_path / "image")
    await run("nbdcopy", *options, "--flush", str(source), server.uri("v"))
    assert source.read_bytes() == volume.content


async def test_nbdcopy_there_and_back_compares_equal(server: Serving, tmp_path: Path) -> None:
    need("nbdcopy")
    source = image(tmp_path / "image")
    await run("nbdcopy", str(source), server.uri("blocks"))
    await run("nbdcopy", server.uri("blocks"), str(tmp_path / "copy"))
    await run("cmp", str(source), str(tmp_path / "copy"))


async def test_qemu_img_converts_compares_and_maps(server: Serving, tmp_path: Path) -> None:
    need("qemu-img")
    source = str(image(tmp_path / "image"))
    uri = server.uri("v")
    await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
    await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, str(tmp_path / "copy"))
    await run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, str(tmp_path / "copy"))
    mapped = json.loads(await run("qemu-img", "map", "--output=json", "-f", "raw", uri))
    assert [(extent["start"], extent["length"], extent["zero"]) for extent in mapped[:3]] == [
        (0, 1 << 20, False),
        (1 << 20, 1 << 20, True),
        (2 << 20, 1 << 20, False),
    ]


@pytest.mark.parametrize("export", ["v", "blocks"])
async def test_qemu_io_writes_discards_and_zeroes(server: Serving, export: str) -> None:
    need("qemu-io")
    volume = server.provider.exports[export]
    assert isinstance(volume, MemoryIO)
    commands = [
        "write -P 0xaa 0 1M",
        "read -P 0xaa 0 1M",
        "write -P 0xbb 4k 64k",
        "read -P 0xbb 4k 64k",
        "read -P 0xaa 68k 4k",
        "write -f -P 0xcc 2M 4k",
        "write -z 0 32k",
        "read -P 0 0 32k",
        "write -z -u 512k 256k",
        "read -P 0 512k 256k",
        "write -z -n -u 512k 256k",
        "discard 1M 1M",
        "flush",
        "aio_write -P 0xdd 8M 64k",
        "aio_read -P 0 5M 64k",
        "aio_flush",
        "read -P 0xdd 8M 64k",
    ]
    arguments = [part for command in commands for part in ("-c", command)]
    output = await run("qemu-io", "-f", "raw", *arguments, server.uri(export))
    assert "failed" not in output
    assert volume.content[4096:8192] == bytes(4096)
    assert volume.content[32768 : 64 << 10] == b"\xbb" * 32768
    assert volume.content[2 << 20 : (2 << 20) + 4096] == b"\xcc" * 4096
    assert volume.content[8 << 20 : (8 << 20) + 65536] == b"\xdd" * 65536
    kinds = {entry[0] for entry in volume.log}
    assert {"write", "zero", "trim", "flush"} <= kinds


async def test_fio_verifies_random_writes_over_four_connections(server: Serving) -> None:
    need("fio")
    output = await run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={server.uri('v')}",
        "--rw=randrw",
        "--bs=4k",
        "--iodepth=16",
        "--numjobs=4",
        f"--size={SIZE // 4}",
        f"--offset_increment={SIZE // 4}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--group_reporting",
        "--output-format=json",
    )
    result = json.loads(output[output.index("{") :])
    (job,) = result["jobs"]
    assert job["error"] == 0
    assert job["read"]["total_ios"] + job["write"]["total_ios"] >= SIZE // 4096
    assert len(server.provider.opened) >= 4


@pytest.mark.parametrize("filters", [[], ["--filter=blocksize"], ["--filter=cache"]])
async def test_nbdkits_nbd_plugin_passes_everything_through(
    server: Serving, volume: MemoryIO, tmp_path: Path, filters: list[str]
) -> None:
    need("nbdkit", "nbdcopy")
    source = image(tmp_path / "image")
    path = server.folder / "kit"
    command = ("nbdkit", "-f", "-U", str(path), *filters, "nbd", f"uri={server.uri('v')}", "shared=true")
    async with running(path, *command):
        await run("nbdcopy", "--flush", str(source), f"nbd+unix:///?socket={path}")
        await run("nbdcopy", f"nbd+unix:///?socket={path}", str(tmp_path / "copy"))
    assert source.read_bytes() == volume.content
    assert filecmp.cmp(source, tmp_path / "copy", shallow=False)


async def test_qemu_nbd_passes_everything_through(server: Serving, volume: MemoryIO, tmp_path: Path) -> None:
    need("qemu-nbd", "nbdcopy")
    source = image(tmp_path / "image")
    path = server.folder / "qemu"
    async with running(path, "qemu-nbd", "-t", "-f", "raw", "-k", str(path), server.uri("v")):
        await run("nbdcopy", "--flush", str(source), f"nbd+unix:///?socket={path}")
        await run("nbdcopy", f"nbd+unix:///?socket={path}", str(tmp_path / "copy"))
    assert source.read_bytes() == volume.content
    assert filecmp.cmp(source, tmp_path / "copy", shallow=False)


async def test_qemu_storage_daemon_passes_everything_through(
    server: Serving, volume: MemoryIO, tmp_path: Path
) -> None:
    need("qemu-storage-daemon", "nbdcopy")
    source = image(tmp_path / "image")
    path = server.folder / "qsd"
    command = (
        "qemu-storage-daemon",
        "--blockdev",
        f"driver=nbd,node-name=disk,server.type=unix,server.path={server.unix_path},export=v",
        "--nbd-server",
        f"addr.type=unix,addr.path={path}",
        "--export",
        "type=nbd,id=out,node-name=disk,name=disk,writable=on",
    )
    async with running(path, *command):
        await run("nbdcopy", "--flush", str(source), f"nbd+unix:///disk?socket={path}")
    assert source.read_bytes() == volume.content


@pytest.mark.parametrize(
    "feature",
    [
        "everything",
        "no structured replies",
        "no block status",
        "export name only",
        "no zeroes padding",
        "list contexts",
        "unfragmented reads",
        "fua",
        "zero and trim",
        "cache",
        "request one",
        "info without going",
        "starttls",
        "errors",
        "pipelining",
    ],
)
async def test_libnbd_gets_each_feature(server: Serving, feature: str) -> None:
    need("/usr/bin/python3")
    probe = await run("/usr/bin/python3", "-c", "try:\n import nbd\nexcept ImportError:\n print('absent')")
    if "absent" in probe:
        pytest.skip("python3-libnbd is not installed")
    output = await run("/usr/bin/python3", str(LIBNBD_SCRIPT), server.unix_path, feature)
    assert output == "ok\n"


async def test_over_tcp_as_well(server: Serving, volume: MemoryIO, tmp_path: Path) -> None:
    need("nbdcopy", "qemu-img")
    address = str(server.server.addresses[1]).removeprefix("tcp:")
    await run("nbdcopy", f"nbd://{address}/v", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == volume.content
    await run("qemu-img", "compare", "-f", "raw", str(tmp_path / "copy"), f"nbd://{address}/v")
