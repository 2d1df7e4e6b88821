"""`python -m bench._nbd_server ADDRESS DEVICE VOLUME`: a volume behind farpage's data plane alone.

Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys

from farpage.address import parse_address
from farpage.blockio import BlockIO
from farpage.device.open import open_device
from farpage.nbd.eventloop import DataPlaneLoop
from farpage.nbd.export import Export, ExportInfo, Peer
from farpage.nbd.server import Server


class _OneVolume:
    """An `ExportProvider` that gives everybody the same volume, whatever name they ask for."""

    def __init__(self, volume: BlockIO) -> None:
        self._volume = volume

    async def open(self, name: str, peer: Peer) -> Export:
        return Export(name, self._volume)

    async def describe(self, name: str, peer: Peer) -> ExportInfo:
        return ExportInfo.of(self._volume)

    async def names(self, peer: Peer) -> list[tuple[str, str]]:
        return [("", "")]


async def _serve(address: str, device_spec: str, volume_name: str) -> None:
    device = await open_device(device_spec)
    volume = await device.open_volume(volume_name, device.volume(volume_name).claim.epoch)
    server = Server(_OneVolume(volume))
    await server.start([parse_address(address)])
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.close()
    await volume.close()
    await device.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=DataPlaneLoop) as runner:
        runner.run(_serve(*sys.argv[1:]))
