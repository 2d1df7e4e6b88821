"""`python -m farpage.vios.processes CONNECTION LOCK FRONT VIOS NUMBER`: a data process, started by its front.

CONNECTION is its end of the channel. LOCK is that of the VIOS' folder, which nobody else can have before
this process has ended too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

from farpage.daemon import begin_to_start, prepare_for_paging, started
from farpage.kernel.parent import end_with_parent
from farpage.log import configure_logging
from farpage.nbd.eventloop import DataPlaneLoop


def main() -> None:
    """Serve until the front asks for the end, or ends."""
    connection, lock, front, vios, number = sys.argv[1:]
    end_with_parent(int(front))
    os.set_inheritable(int(lock), False)
    # What goes to the whole process group, or to all of a service: the front decides when its processes end.
    for number_ in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_, signal.SIG_IGN)
    begin_to_start()
    configure_logging(vios=vios, process=number)
    os.umask(0o077)
    with asyncio.Runner(loop_factory=DataPlaneLoop) as runner:
        runner.run(_serve(socket.socket(fileno=int(connection))))


async def _serve(connection: socket.socket) -> None:
    from farpage.vios.processes.inside import Inside

    inside = Inside(connection)
    prepare_for_paging()
    started()
    await inside.until_ended()


if __name__ == "__main__":
    main()
