"""`python -m farpage.pager DESCRIPTOR`: a data worker, started with its end of a channel."""

from __future__ import annotations

import asyncio
import signal
import sys

from farpage.daemon import prepare_for_paging
from farpage.pager.worker import run


def main() -> None:
    """Work until the control process ends."""
    # Ctrl-C goes to the whole process group; the control process decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_for_paging()
    asyncio.run(run(int(sys.argv[1])))


if __name__ == "__main__":
    main()
