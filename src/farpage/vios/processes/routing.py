"""Who serves which volume: the data processes, and the table that says whose a volume is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from farpage.errors import FarpageError
from farpage.log import get_logger
from farpage.pager.channel import Handler
from farpage.vios.figures import Figures
from farpage.vios.processes.messages import Device, Nothing
from farpage.vios.processes.process import ANSWER_SECONDS, START_SECONDS, DataProcess, Start
from farpage.vios.processes.routes import Routes
from farpage.vios.volumes import Volumes

log = get_logger()


class Routing:
    """The data processes of one front; in the event loop of its main thread."""

    def __init__(self, vios: str, processes: int, lock: int) -> None:
        """Start the processes, which load while the front does; they serve from `begin` on."""
        self.routes = Routes(processes)
        self.on_request: Handler
        self._volumes: Volumes | None = None
        self._telling = asyncio.Lock()
        self.processes = tuple(DataProcess(vios, index, lock, self._asked) for index in range(processes))

    async def _asked(self, method: str, parameters: object, descriptors: list[int]) -> Nothing:
        answer = await self.on_request(method, parameters, descriptors)
        assert isinstance(answer, Nothing)
        return answer

    async def begin(self, volumes: Volumes, start: Callable[[], Start], on_request: Handler) -> None:
        """Let them serve, and wait until each does.

        :raise DataProcessAway: one does not.
        """
        self._volumes = volumes
        self.on_request = on_request
        for process in self.processes:
            process.begin(start)
        await asyncio.gather(*(process.until_up(START_SECONDS) for process in self.processes))

    @asynccontextmanager
    async def holding(self, volume: str, device: str = "") -> AsyncIterator[DataProcess]:
        """Keep a volume with its process, whether or not that is up.

        :raise VolumeMissing: there is no such volume.
        :raise DeviceUnusable: a device where it may be does not answer as it should.
        """
        assert self._volumes is not None
        if volume not in self.routes:
            await self._volumes.find(volume, device)
        with self.routes.using(volume) as index:
            yield self.processes[index]

    @asynccontextmanager
    async def using(self, volume: str, device: str = "") -> AsyncIterator[DataProcess]:
        """Ask a volume's process something about it; the volume stays with that meanwhile.

        :raise VolumeMissing: there is no such volume.
        :raise DeviceUnusable: a device where it may be does not answer as it should.
        :raise DataProcessAway: the process is not up.
        """
        async with self.holding(volume, device) as process:
            await process.until_up()
            yield process

    @property
    def figures(self) -> list[Figures]:
        """What each of them has counted, as of the last refresh."""
        return [process.figures for process in self.processes]

    @property
    def open_exports(self) -> int:
        """Connections that have a volume open, as of the last look."""
        return sum(process.open_exports for process in self.processes)

    @property
    def restarts(self) -> int:
        """Processes that were started in the place of others."""
        return sum(process.restarts for process in self.processes)

    @property
    def pids(self) -> tuple[int, ...]:
        """Those that run now."""
        return tuple(process.pid for process in self.processes if process.pid is not None)

    async def look(self) -> None:
        """Bring the number of connections up to date."""
        await asyncio.gather(*(process.look(ANSWER_SECONDS) for process in self.processes))

    async def refresh(self) -> None:
        """Bring the figures up to date."""
        await asyncio.gather(*(process.refresh() for process in self.processes))

    async def tell_definition(self, current: Callable[[], bytes]) -> None:
        """Have all of them go by the definition that is stored.

        :raise DataProcessSilent: one neither does nor ends.
        """
        async with self._telling:
            definition = current()
            await asyncio.gather(*(process.tell_definition(definition) for process in self.processes))

    async def tell_device(self, spec: str) -> None:
        """Have the processes serve a device too; those that begin later know of it."""
        for process in self.processes:
            if process.begun:
                try:
                    await process.ask("device", Device(spec=spec), Nothing)
                except FarpageError as error:
                    log.error("device_unusable", spec=spec, process=process.index, problem=str(error))

    async def stop(self) -> None:
        """Have all of them finish what is in flight and end."""
        await asyncio.gather(*(process.stop() for process in self.processes))

    async def end(self) -> None:
        """Let none stay behind; on return all have ended wholly."""
        await asyncio.gather(*(process.end() for process in self.processes))
