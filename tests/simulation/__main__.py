"""Run seeds by hand: `python -m tests.simulation --seed N`."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback

from tests.simulation.mutations import MUTATIONS
from tests.simulation.run import SCENARIOS, run_seed

BY_NAME = {kind.__name__: kind for kind in SCENARIOS}


def main() -> int:
    """Run what the command line asks for; the exit status is 1 when a run violated something."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run one seed")
    parser.add_argument("--scenario", choices=sorted(BY_NAME), help="run this scenario, whatever is drawn")
    parser.add_argument("--seeds", help="run the seeds FIRST-LAST")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="take a protection away")
    parser.add_argument("--first", action="store_true", help="end at the first seed with a violation")
    parser.add_argument("--digests", action="store_true", help="print the hash of each trace")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the trace")
    arguments = parser.parse_args()
    seeds = (
        range(arguments.seed, arguments.seed + 1) if arguments.seed is not None else _range(arguments.seeds)
    )
    gc.freeze()  # what was imported stays: the garbage collector need not look through it again and again
    began = time.process_time()
    bad = reads = events = 0
    for seed in seeds:
        outcome = run_seed(
            seed,
            mutation=arguments.mutation,
            kind=BY_NAME.get(arguments.scenario),
            trace=print if arguments.verbose else None,
        )
        reads += outcome.reads
        events += outcome.events
        if arguments.digests:
            print(f"seed {seed}: {outcome.digest}")
        if outcome.violations:
            bad += 1
            print(f"seed {seed}: {outcome.violations[0]}")
            if arguments.verbose and outcome.error:
                traceback.print_exception(outcome.error)
            if arguments.first:
                break
    seconds = time.process_time() - began
    print(
        f"{len(seeds)} seeds, {bad} with violations, {reads} reads checked, {events} events, "
        f"{seconds / len(seeds) * 1000:.1f} ms a seed"
    )
    return 1 if bad else 0


def _range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last) + 1)


if __name__ == "__main__":
    sys.exit(main())
