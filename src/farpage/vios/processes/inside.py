"""What runs in a data process: the VIOS' own service over its volumes, with its front in place of the API.

The front answers for the definition and the epochs: they are told here before they are acknowledged there.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import msgspec

from farpage.definition.errors import StoreFailed
from farpage.definition.model import Definition
from farpage.definition.store import DefinitionStore
from farpage.errors import FarpageError
from farpage.log import get_logger
from farpage.message import Message
from farpage.nbd.errors import ExportRefused
from farpage.nbd.export import Peer
from farpage.pager.channel import Channel, Handing, PeerError, PeerGone
from farpage.vios.copying.copies import Copies
from farpage.vios.exports import VolumeExports
from farpage.vios.figures import Figures
from farpage.vios.handovers import Handovers
from farpage.vios.model import IntermediaryReport
from farpage.vios.processes import messages as m
from farpage.vios.processes.leasetable import SharedLeases
from farpage.vios.remembered import RememberedDevice, RememberedDevices
from farpage.vios.service import ViosService
from farpage.vios.volumes import Volumes

log = get_logger()

Work: TypeAlias = Callable[[Any, list[int]], Awaitable[Message]]

_FRONT: Final = Peer("front")


class ToldDefinitions(DefinitionStore):
    """The definition, as the front tells it."""

    def __init__(self, definition: Definition) -> None:
        self._lock = threading.Lock()
        self._current = definition

    def tell(self, definition: Definition) -> None:
        """Go by another one."""
        with self._lock:
            self._current = definition

    def compare_and_swap(self, expected_revision: int, definition: Definition) -> Definition:
        """Refuse: only the front stores definitions."""
        raise NotImplementedError


class ToldEpochs:
    """The epochs, which the front stores. Safe to use from any thread but the event loop's."""

    def __init__(
        self,
        known: dict[str, tuple[int, str]],
        ask_front: Callable[[str, m.Epoch], Coroutine[Any, Any, None]],
    ) -> None:
        self._known = known
        self._ask_front = ask_front
        self._loop = asyncio.get_running_loop()

    def highest(self, volume_id: str) -> tuple[int, str]:
        """Return the highest epoch seen, 0 for none, and its owner."""
        return self._known.get(volume_id, (0, ""))

    def raise_to(self, volume_id: str, epoch: int, owner: str = "") -> None:
        """Have it recorded.

        :raise StoreFailed: the front cannot.
        """
        if epoch > self.highest(volume_id)[0]:
            self._call("epoch", m.Epoch(volume_id=volume_id, epoch=epoch, owner=owner))
            self._known[volume_id] = (epoch, owner)

    def forget(self, volume_id: str) -> None:
        """Have the record dropped.

        :raise StoreFailed: the front cannot.
        """
        self._call("forget", m.Epoch(volume_id=volume_id))
        self._known.pop(volume_id, None)

    def _call(self, method: str, about: m.Epoch) -> None:
        try:
            asyncio.run_coroutine_threadsafe(self._ask_front(method, about), self._loop).result()
        except (PeerError, PeerGone) as error:
            raise StoreFailed("the front's database", error.cause) from error


class Inside:
    """One data process, from its first message to its end."""

    def __init__(self, connection: socket.socket) -> None:
        """Listen to the front at the other end of `connection`, with which this process ends."""
        self._channel = Channel(connection, on_request=self._answer, on_closed=_end)
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._defining = asyncio.Lock()
        self._service: ViosService | None = None
        self._definitions: ToldDefinitions | None = None
        self._work: dict[str, tuple[type[Message], Work]] = {
            "begin": (m.Begin, self._begin),
            "device": (m.Device, self._device),
            "open": (m.Open, self._open),
            "describe": (m.Volume, self._describe),
            "claim": (m.Volume, self._claim),
            "claims": (m.Nothing, self._claims),
            "refuse": (m.Volume, self._refuse),
            "flush": (m.Volume, self._flush),
            "delete": (m.Volume, self._delete),
            "intermediary": (m.Report, self._intermediary),
            "copy_status": (m.Report, self._copy_status),
            "early_end": (m.Volume, self._early_end),
            "ping": (m.Nothing, self._ping),
            "figures": (m.Nothing, self._figures),
        }

    async def until_ended(self) -> None:
        """Return when the front has asked for the end, and nothing is in flight."""
        await self._ended.wait()

    @property
    def _serving(self) -> ViosService:
        assert self._service is not None
        return self._service

    async def _answer(self, method: str, parameters: Any, descriptors: list[int]) -> Message | Handing:
        try:
            result = await self._carry_out(method, parameters, descriptors)
        except FarpageError as error:
            return m.Outcome(failure=m.Failure.of(error))
        except Exception as error:
            log.exception("unexpected_error", request=method)
            message = f"{method!r} failed unexpectedly ({type(error).__name__}) in a data process"
            remedy = "look into the VIOS' log, which has the traceback; please report it"
            failure = m.Failure(code="internal", message=message, remedy=remedy, status=1, details={})
            return m.Outcome(failure=failure)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        content = m.encoded(result)
        if len(content) <= m.LONGEST_BYTES:
            return m.Outcome(result=result)
        file = m.file_of(content)
        # The channel duplicates it before anything else runs.
        self._loop.call_soon(os.close, file)
        return Handing(m.Outcome(), (file,))

    async def _carry_out(self, method: str, parameters: Any, descriptors: list[int]) -> Message:
        """Do what the front asks for; who uses a descriptor takes it out of the list."""
        if method == "definition":
            return await self._definition(descriptors)
        if method == "stop":
            return await self._stop()
        kind, work = self._work[method]
        async with self._defining:  # what was told before counts
            pass
        return await work(kind.model_validate(parameters), descriptors)

    # The whole

    async def _begin(self, wanted: m.Begin, descriptors: list[int]) -> m.Nothing:
        definition, epochs, leases = descriptors
        descriptors.clear()
        known = msgspec.json.decode(m.read_file(epochs), type=dict[str, tuple[int, str]])
        self._definitions = ToldDefinitions(Definition.model_validate_json(m.read_file(definition)))
        volumes = Volumes(wanted.vios, self._definitions, ToldEpochs(known, self._ask_front))
        state_dir = Path(wanted.state_dir)
        handovers = Handovers(state_dir)
        copies = Copies(wanted.vios, volumes, self._definitions, state_dir, tidies=False)

        def deleted(volume_id: str) -> None:
            handovers.remove(volume_id)
            copies.forget(volume_id)

        volumes.on_deleted = deleted
        try:
            shared = SharedLeases(leases, wanted.lease_seconds)
        finally:
            os.close(leases)
        self._service = ViosService(
            name=wanted.vios,
            loop=self._loop,
            volumes=volumes,
            exports=VolumeExports(volumes, shared, copies, adopts=True),
            definitions=self._definitions,
            remembered=cast(RememberedDevices, None),  # its front remembers devices
            handovers=handovers,
        )
        await asyncio.gather(*(self._device(m.Device(spec=spec), []) for spec in wanted.devices))
        return m.Nothing()

    async def _ask_front(self, method: str, about: m.Epoch) -> None:
        await self._channel.call(method, about, m.Nothing)

    async def _definition(self, descriptors: list[int]) -> m.Nothing:
        content = m.read_file(descriptors.pop())
        async with self._defining:
            if self._definitions is not None:
                # In a thread: clients would wait for a long one.
                definition = await asyncio.to_thread(Definition.model_validate_json, content)
                self._definitions.tell(definition)
                self._serving.exports.follow_definition()
        return m.Nothing()

    async def _stop(self) -> m.Nothing:
        if self._service is not None:
            async with self._service.draining():
                pass
        # After the answer is sent.
        self._loop.call_soon(self._ended.set)
        return m.Nothing()

    async def _device(self, wanted: m.Device, _descriptors: list[int]) -> m.Nothing:
        """Serve a device; one that cannot be used yet is tried again in the background."""
        await self._serving.serve_from_start(RememberedDevice(wanted.spec, None, None))
        return m.Nothing()

    async def _ping(self, _nothing: m.Nothing, _descriptors: list[int]) -> m.Alive:
        return m.Alive(open_exports=self._serving.exports.open_exports)

    async def _figures(self, _nothing: m.Nothing, _descriptors: list[int]) -> Figures:
        return self._serving.exports.figures()

    # Clients

    async def _open(self, wanted: m.Open, descriptors: list[int]) -> m.Opened:
        sock = socket.socket(fileno=descriptors.pop())
        try:
            await self._serving.exports.server.adopt(sock, wanted.step, wanted.agreed)
        except ExportRefused as refusal:
            return m.Opened(refusal=m.Refusal(reply_type=refusal.reply_type, message=refusal.message))
        return m.Opened()

    async def _describe(self, wanted: m.Volume, _descriptors: list[int]) -> m.Described:
        try:
            return m.Described.of(await self._serving.exports.describe(wanted.name, _FRONT))
        except ExportRefused as refusal:
            return m.Described(refusal=m.Refusal(reply_type=refusal.reply_type, message=refusal.message))

    # Volumes

    async def _claim(self, wanted: m.Volume, _descriptors: list[int]) -> m.Nothing:
        await self._serving.volumes.claim(wanted.name, wanted.claim, wanted.device)
        return m.Nothing()

    async def _claims(self, _nothing: m.Nothing, descriptors: list[int]) -> m.Nothing:
        content = m.read_file(descriptors.pop())
        await self._serving.claim_all(msgspec.json.decode(content, type=m.Claims).wanted)
        return m.Nothing()

    async def _refuse(self, wanted: m.Volume, _descriptors: list[int]) -> m.VolumeId:
        located = await self._serving.owned(wanted.name, wanted.device, wanted.claim)
        return m.VolumeId(device=located.device.id, volume_id=located.stat.id)

    async def _flush(self, wanted: m.Volume, _descriptors: list[int]) -> m.VolumeId:
        located = await self._serving.flushed(wanted.name, wanted.device, wanted.claim)
        return m.VolumeId(device=located.device.id, volume_id=located.stat.id)

    async def _delete(self, wanted: m.Volume, _descriptors: list[int]) -> m.Deleted:
        await self._serving.volumes.delete(wanted.name, wanted.epoch, wanted.device)
        copied = any(copying.move.volume == wanted.name for copying in self._copies.all)
        return m.Deleted(open=copied or self._serving.exports.has_open(wanted.name))

    # Moves

    @property
    def _copies(self) -> Copies:
        copies = self._serving.exports.copies
        assert copies is not None
        return copies

    async def _intermediary(self, wanted: m.Report, _descriptors: list[int]) -> m.Document:
        report = IntermediaryReport.model_validate_json(wanted.report)
        orders = await self._copies.report(wanted.name, wanted.device, report)
        return m.Document(json=orders.model_dump_json())

    async def _copy_status(self, wanted: m.Report, _descriptors: list[int]) -> m.Document:
        status = await self._copies.status(wanted.name, wanted.device)
        return m.Document(json=status.model_dump_json())

    async def _early_end(self, wanted: m.Volume, descriptors: list[int]) -> m.Nothing:
        definition = await asyncio.to_thread(Definition.model_validate_json, m.read_file(descriptors.pop()))
        await self._copies.refuse_early_end(definition, wanted.name)
        return m.Nothing()


def _end() -> None:
    """End with the front: nobody would tell this process of newer owners any more."""
    # At once, also when a device hangs: nothing is lost that a client was not told of.
    os._exit(1)
