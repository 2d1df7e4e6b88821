"""`python -m farpage.pager DESCRIPTOR FOLDER`: a data worker, started with its end of a channel."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from farpage.daemon import prepare_for_paging, started
from farpage.log import configure_logging
from farpage.nbd.eventloop import DataPlaneLoop
from farpage.pager.worker import run


def main() -> None:
    """Work until there is neither a control process nor a client."""
    # Ctrl-C goes to the whole process group; the control process decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(worker=str(os.getpid()))
    prepare_for_paging()
    started()
    with asyncio.Runner(loop_factory=DataPlaneLoop) as runner:
        runner.run(run(int(sys.argv[1]), Path(sys.argv[2])))


if __name__ == "__main__":
    main()
