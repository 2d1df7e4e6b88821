"""`nbd://` and `nbd+unix://`: an export of any NBD server as a device with one volume.

NBD has no compare-and-swap and no locks, so VIOS that share an export can only write to different places of
its header and look what is there afterwards; docs/devices.md says what that means for fencing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

from farpage.blockio import BlockIO, read_bytes
from farpage.device.base import BLOCK_BYTES, Admit, Usage, admit_all, never
from farpage.device.directory import default_name
from farpage.device.errors import DeviceUnusable
from farpage.device.layout import DATA_OFFSET_BYTES, HEADER_BYTES, DeviceLabel, parse_header
from farpage.device.occupied import refuse_signed
from farpage.device.reconnect import Reconnecting, open_connection
from farpage.device.remotestorage import RemoteStorage
from farpage.device.remotevolume import HeaderChecks, RemoteVolume, remote_features, remote_limits
from farpage.device.spans import SpanGate
from farpage.device.spec import RemoteSpec
from farpage.device.threads import IoThreads
from farpage.device.whole import WholeDevice, prepare_label, unusable
from farpage.errors import FarpageError
from farpage.kernel.memory import create_memfd
from farpage.nbd.client import Connection

_THREADS: Final = 2
_HINT: Final = "check that the NBD server runs and exports the same storage as before"

Result = TypeVar("Result")


class RemoteDevice(WholeDevice):
    """A labelled export; `open_remote_device` opens one."""

    kind = "nbd"
    hint = _HINT

    def __init__(
        self, export: Reconnecting, storage: RemoteStorage, label: DeviceLabel, *, text: str
    ) -> None:
        """Take over the export, in its event loop."""
        super().__init__(storage, label, text=text)
        self.limits = remote_limits(export)
        self.features = remote_features(export)
        self._export = export
        self._checks = HeaderChecks(export, self.headers)
        self._gate = SpanGate()
        self._opened: list[RemoteVolume] = []
        self._threads = IoThreads(f"io-{label.name}"[:15], _THREADS)
        export.name = label.name
        export.verify = self._is_same

    @property
    def access(self) -> str:  # type: ignore[override]
        """How many connections there are to the server."""
        count = self._export.connections
        return f"{count} connection{'' if count == 1 else 's'}"

    @property
    def reconnects(self) -> int:
        """Connections that were made anew."""
        return self._export.reconnects

    def usage(self) -> Usage:
        """Look at the header, if there is a connection."""
        if self._export.problem:
            raise DeviceUnusable(self.spec, self._export.problem, self.hint)
        return super().usage()

    def in_use(self) -> str:
        """Look for volumes that are open here; another VIOS that shares the export does not show."""
        return " through this VIOS" if self._opened else ""

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run it in one of the device's threads."""
        return await self._threads.run(work, *arguments)

    async def open_volume(self, name: str, epoch: int | None, over: Callable[[], bool] = never) -> BlockIO:
        """Open the volume over the device's connections."""
        entry, hold = await self._threads.run(self.hold, name, epoch)
        volume = _Opened(
            self._export, self._checks, self._gate, size_bytes=entry.size_bytes, hold=hold, over=over
        )
        self._opened.append(volume)
        volume.on_closed = lambda: self._opened.remove(volume)
        return volume

    async def close(self) -> None:
        """End the connections and the threads."""
        await self._export.close()
        await self._threads.close()

    async def _is_same(self, connection: Connection) -> str:
        """Look whether a new connection leads to this device: a server may export something else by now."""
        header = parse_header(await read_bytes(connection, 0, HEADER_BYTES))
        if header.label is None or header.label.uuid != self.id:
            return "the export carries another label, or none: it is another one, or has lost its contents"
        return ""


class _Opened(RemoteVolume):
    """A volume that the device counts."""

    on_closed: Callable[[], None]

    async def close(self) -> None:
        """Wait for the commands in flight."""
        await super().close()
        self.on_closed()


async def open_remote_device(
    spec: RemoteSpec,
    *,
    text: str | None = None,
    name: str | None = None,
    size_bytes: int | None = None,
    force: bool = False,
    admit: Admit = admit_all,
) -> RemoteDevice:
    """Connect to an export and label it if it has no label yet; `force` overrides the refusal of signatures.

    :raise DeviceUnusable: it cannot be reached, holds something else, or is not as asked for.
    """
    text = text or str(spec)
    try:
        first = await open_connection(spec.uri.address, spec.uri.export)
    except FarpageError as error:
        raise DeviceUnusable(text, error.cause, _HINT) from error
    if first.limits.minimum > BLOCK_BYTES:
        first.abort()
        raise DeviceUnusable(
            text, f"its blocks of {first.limits.minimum} bytes are longer than a page", "use another server"
        )
    export = Reconnecting(spec.uri.address, spec.uri.export, first, name=name or text)
    storage = RemoteStorage(export)
    try:
        label = await asyncio.to_thread(
            partial(
                prepare_label,
                storage,
                text=text,
                default_name=default_name(spec.uri.export or "nbd"),
                name=name,
                size_bytes=size_bytes,
                refuse_foreign=(lambda: None) if force else partial(_refuse_signed, text, storage),
                admit=admit,
            )
        )
        return RemoteDevice(export, storage, label, text=text)
    except (OSError, ValueError) as error:
        await export.close()
        raise unusable(text, error, _HINT) from error
    except BaseException:
        await export.close()
        raise


def _refuse_signed(text: str, storage: RemoteStorage) -> None:
    """Have blkid look at a copy of the export's both ends, where signatures lie."""
    descriptor = create_memfd("farpage-probe", storage.size_bytes)
    try:
        end = storage.size_bytes // BLOCK_BYTES * BLOCK_BYTES
        tail = max(DATA_OFFSET_BYTES, end - DATA_OFFSET_BYTES)
        os.pwrite(descriptor, storage.read(0, DATA_OFFSET_BYTES), 0)
        if tail < end:
            os.pwrite(descriptor, storage.read(tail, end - tail), tail)
        refuse_signed(text, f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)
