"""A copying volume over two devices in memory, whose commands finish when a test says so.

A page holds one byte value throughout. The old device's VIOS is modelled by what it promises: a connection
that was lost may have carried out any of its commands, but does nothing any more once the next one is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from farpage.address import Address, UnixAddress
from farpage.blockio import CONNECTION_LOST, BlockLimits, Done, ExtentsDone, Feature, ReadDone
from farpage.definition.model import PAGE_BYTES
from farpage.nbd.errors import ServerUnreachable
from farpage.nbd.replaying import Losable
from farpage.vios.copying.copy import VolumeCopy
from farpage.vios.copying.fill import FillVolume
from farpage.vios.copying.presence import Presence, PresenceKey
from farpage.vios.copying.relay import Relay
from farpage.vios.copying.volume import CopyingVolume
from farpage.volume.refusal import Refusal
from tests.support.blockio import MemoryIO

PAGE = PAGE_BYTES
PAGES = 12
GARBAGE = 0xEE
"""What the new device holds where nothing was brought yet; never a value of the client."""
ADDRESS = UnixAddress("/relay")


class OldLink:
    """A connection over the relay to the old device."""

    read_only = False
    limits = BlockLimits()
    features = Feature.FLUSH | Feature.FUA | Feature.TRIM | Feature.ZERO | Feature.EXTENTS

    def __init__(self, device: MemoryIO) -> None:
        self.size_bytes = device.size_bytes
        self.on_lost: Callable[[Exception], None] | None = None
        self.ended = False
        self.device = device
        self.commands: list[_Sent] = []

    def _add(self, carry_out: Callable[[Callable[..., None]], None], done: Callable[..., None]) -> None:
        sent = _Sent(carry_out, done)
        if self.ended:
            sent.lose()
        else:
            self.commands.append(sent)

    def read_now(self, offset: int, into: memoryview) -> bool:
        return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        self._add(lambda end: self.device.read(offset, length, end), done)

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        self._add(lambda end: self.device.write(offset, data, end, fua=fua), done)

    def zero(
        self,
        offset: int,
        length: int,
        done: Done,
        *,
        punch: bool = True,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        self._add(lambda end: self.device.zero(offset, length, end), done)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        self._add(lambda end: self.device.trim(offset, length, end), done)

    def cache(self, offset: int, length: int, done: Done) -> None:
        raise NotImplementedError

    def flush(self, done: Done) -> None:
        self._add(self.device.flush, done)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        self._add(lambda end: self.device.extents(offset, length, end), done)

    def answer(self, index: int = 0) -> None:
        """Carry one command out and answer it."""
        sent = self.commands.pop(index % len(self.commands))
        sent.carry_out(sent.done)

    def lose(self, carried_out: Callable[[], bool] = lambda: True) -> None:
        """Lose the connection; some of what was in flight was carried out all the same."""
        if self.on_lost is not None:
            self.on_lost(ConnectionError("lost"))
        self._finish(carried_out)

    def abort(self) -> None:
        self._finish(lambda: True)

    def _finish(self, carried_out: Callable[[], bool]) -> None:
        self.ended = True
        commands, self.commands = self.commands, []
        for sent in commands:
            if carried_out():
                sent.carry_out(lambda *_: None)
            sent.lose()

    async def close(self) -> None:
        self.abort()


@dataclass(eq=False)
class _Sent:
    carry_out: Callable[[Callable[..., None]], None]
    done: Callable[..., None]

    def lose(self) -> None:
        try:
            self.done(CONNECTION_LOST)
        except TypeError:
            self.done(CONNECTION_LOST, None)


@dataclass
class MemoryStore:
    """What is stored of presence outlives a process."""

    blocks: dict[int, bytes] = field(default_factory=dict)
    failing: bool = False

    def store(self, blocks: dict[int, bytes]) -> None:
        if self.failing:
            raise OSError("no room")
        self.blocks.update(blocks)

    def close(self) -> None:
        pass


@dataclass(eq=False)
class Change:
    """A client's write or zeroing of `pages` with `value`; `ended` when it was acknowledged."""

    pages: range
    value: int
    began: int
    ended: int | None = None
    data: memoryview = field(default_factory=lambda: memoryview(b""))


class CopyRig:
    """The first VIOS with one owner's connection, the old device behind a relay, and a filler."""

    def __init__(self, *, pages: int = PAGES) -> None:
        self.pages = pages
        self.key = PresenceKey("0b6f3d1e-0000-4000-8000-000000000001", "00000000000000aa", pages)
        self.store = MemoryStore()
        self.new = MemoryIO(pages * PAGE, at_hand=False)
        self.new.content[:] = bytes([GARBAGE]) * (pages * PAGE)
        self.old = MemoryIO(pages * PAGE)
        self.link: OldLink | None = None
        self.links: list[OldLink] = []
        self.refusals: list[Refusal] = []
        self.reachable = True
        self.start()

    def start(self) -> None:
        """Start the first VIOS, with what is stored."""
        presence = Presence(self.pages)
        for index, block in self.store.blocks.items():
            assert presence.load(index, block, self.key)
        self.copy = VolumeCopy(self.key, presence, self.store, self.new, _at_once)
        self.fills = FillVolume(self.copy, self.new.limits)
        self.open()

    def open(self) -> None:
        """Open the volume for the owner."""
        self.relay = Relay("V/D2@1+P", self.pages * PAGE, self.refusals.append, self._dial)
        self.volume = CopyingVolume(self.copy, self.new, self.relay.port())
        self.relay.announce(ADDRESS)

    async def _dial(self, address: Address, export: str) -> Losable:
        if not self.reachable:
            raise ServerUnreachable(export, str(address), "nobody is there")
        self.link = OldLink(self.old)
        self.links.append(self.link)
        return self.link

    async def relay_closed(self, volume: CopyingVolume) -> None:
        """Close the owner's volume, but not the device, which is the same one for all."""
        await volume._relay.close()

    def kill(self) -> list[Callable[[], None]]:
        """End the VIOS and return what its system calls do yet; nobody hears of their ends."""
        steps, self.new.held = self.new.held, []
        self.copy._closed = True
        if self.copy._timer is not None:
            self.copy._timer.cancel()
        self.relay._task.cancel()
        if self.link is not None and not self.link.ended:
            self.link.on_lost = None
            for sent in self.link.commands:
                sent.done = lambda *_: None
            self.link.abort()
        return steps

    def lose_relay(self, carried_out: Callable[[], bool] = lambda: True) -> None:
        """Lose the relay, and the way to it."""
        self.reachable = False
        if self.link is not None and not self.link.ended:
            self.link.lose(carried_out)

    def page(self, device: MemoryIO, page: int) -> int:
        """Return the value that a page holds, which must be whole."""
        content = bytes(device.content[page * PAGE : (page + 1) * PAGE])
        assert content == content[:1] * PAGE, f"page {page} is torn"
        return content[0]

    def present(self) -> list[int]:
        """List the present pages."""
        return [page for page in range(self.pages) if self.copy.presence.present[page]]

    # Commands with results in lists

    def write(self, page: int, value: int, count: int = 1) -> list[int]:
        errors: list[int] = []
        self.volume.write(page * PAGE, memoryview(bytes([value]) * (PAGE * count)), errors.append)
        return errors

    def read(self, page: int, count: int = 1) -> list[list[int] | None]:
        found: list[list[int] | None] = []

        def done(error: int, payload: memoryview | None) -> None:
            values = None
            if payload is not None and not error:
                values = [payload[at * PAGE] for at in range(count)]
                assert bytes(payload) == b"".join(bytes([value]) * PAGE for value in values)
            found.append(values)

        self.volume.read(page * PAGE, count * PAGE, done)
        return found

    def fill(self, page: int, value: int, count: int = 1) -> list[int]:
        errors: list[int] = []
        self.fills.write(page * PAGE, memoryview(bytes([value]) * (PAGE * count)), errors.append)
        return errors

    async def settle(self) -> None:
        """Let everything happen that waits for nothing."""
        for _ in range(12):
            await asyncio.sleep(0)

    async def quiesce(self) -> None:
        """Carry out everything that is held, until nothing is."""
        self.reachable = True
        self.relay.announce(ADDRESS)
        for _ in range(100):
            await asyncio.sleep(0.05)
            self.new.release_all()
            while self.link is not None and self.link.commands:
                self.link.answer(0)


async def _at_once(function: Callable[..., object], *arguments: object) -> object:
    return function(*arguments)
