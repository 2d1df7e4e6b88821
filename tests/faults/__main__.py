"""`python -m tests.faults --seed N --minutes M`: a campaign of faults, by hand."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import threading
import time
from pathlib import Path

from bench._machine import describe_disk, describe_machine, describe_placement
from tests.faults.campaign.report import describe
from tests.faults.campaign.run import CampaignOptions, run_campaign
from tests.faults.campaign.schedule import Kind


def main() -> int:
    """Run it and print what it found; the exit status is 1 when anything happened that must never.

    SIGINT and SIGTERM end it after the fault at hand, with all that it found.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Does faults to a running set whose clients verify every page, as one seed decides.",
    )
    parser.add_argument("--seed", type=int, default=1, help="decides which faults, in which order")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long")
    parser.add_argument("--path-timeout", type=float, default=1.0, help="seconds, as of the hypervisor")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(Kind), default=list(Kind), help="only these faults"
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=CampaignOptions.parent,
        help="where the devices and everything else lie; a short path, for sockets",
    )
    parser.add_argument("--quiet", action="store_true", help="do not tell of each fault")
    words = parser.parse_args()
    options = CampaignOptions(
        seed=words.seed,
        seconds=words.minutes * 60,
        path_timeout_seconds=words.path_timeout,
        kinds=frozenset(map(Kind, words.kinds)),
        parent=words.dir,
    )
    begin = time.monotonic()

    def tell(text: str) -> None:
        if not words.quiet:
            print(f"{time.monotonic() - begin:8.2f} {text}", file=sys.stderr, flush=True)

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    outcome = asyncio.run(run_campaign(options, tell, ended.is_set))
    where = f"{describe_machine()}; {describe_disk(words.dir)}; {describe_placement()}"
    print(f"Seed {words.seed}; {where};", describe(outcome))
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
