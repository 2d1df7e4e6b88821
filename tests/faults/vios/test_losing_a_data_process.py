"""A data process that hangs with writes: its own end, not its front's, says that they are over."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path

from farpage.blockio import read_bytes, wait_done
from farpage.volume.connector import ConnectNbd, Endpoint
from farpage.volume.deaths import ServerDeaths
from farpage.volume.lease import Leases
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from tests.support.vios import until, vios_processes

PAGE = 4096
PAGES = 64
LEASE_SECONDS = 300.0
"""Longer than the test may take: nothing is told by its end."""
LIMIT_SECONDS = 60.0


class NoEvents:
    """An owner who wants to hear of nothing."""

    def epoch_raised(self, epoch: int) -> None: ...

    def vios_doubted(self, vios: str) -> None: ...

    def alarm(self, kind: str, message: str) -> None: ...


async def test_writes_at_a_data_process_that_hangs_are_repeated_when_it_has_ended(folder: Path) -> None:
    with vios_processes(folder, "one", "two", devices=[f"dir:{folder}/disk?size=16M"]) as both:
        one, two = both
        for vios in both:
            vios.stop()
            vios.change = {"lease_seconds": LEASE_SECONDS, "workers": 2}
            vios.start()
        await one.create("v", PAGES * PAGE)
        connect = ConnectNbd(ServerDeaths())
        leases = Leases(connect)
        endpoints = [Endpoint(vios.name, vios.data, "disk", lease_seconds=LEASE_SECONDS) for vios in both]
        volume = MultipathVolume(
            "v",
            PAGES * PAGE,
            Ownership("00000001000000aa", 1),
            endpoints,
            connector=connect,
            events=NoEvents(),
            leases=leases,
            path_timeout_seconds=0.3,
        )
        await volume.open(LIMIT_SECONDS)
        active = next(vios for vios in both if vios.name == volume.active_vios)
        pid = (await active.connect("v")).peer_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        content = os.urandom(PAGES * PAGE)
        pages = [memoryview(content)[page * PAGE : (page + 1) * PAGE] for page in range(PAGES)]
        writes = [
            asyncio.ensure_future(wait_done(partial(volume.write, page * PAGE, pages[page])))
            for page in range(PAGES)
        ]
        volume.push()
        async with asyncio.timeout(LIMIT_SECONDS):
            await until(lambda: volume.held_bytes > 0)
            assert not any(write.done() for write in writes)
            # The front of the VIOS lives on; the process is killed by it, as it does not answer.
            assert set(await asyncio.gather(*writes)) == {0}
        assert active.pid
        assert volume.held_bytes == 0
        view = await two.connect("v")
        assert await read_bytes(view, 0, PAGES * PAGE) == content
        await view.close()
        await volume.close()
        leases.close()
