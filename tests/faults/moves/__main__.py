"""`python -m tests.faults.moves --seeds 1-20`: each part of a move killed at 20 instants, by hand."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Sequence

from bench._machine import describe_machine, describe_placement
from tests.faults.moves.kills import (
    INSTANTS,
    LIMIT_BYTES,
    PAGES,
    Killed,
    Role,
    kill_in_move,
    usual_seconds,
)
from tests.support.moving_client import moving_client


async def run(roles: Sequence[Role], seeds: range, *, quiet: bool) -> dict[Role, list[Killed]]:
    """Do the kills, all to one client that goes to and fro.

    :raise AssertionError: a volume is not whole in one place alone, or a page is wrong.
    """
    found: dict[Role, list[Killed]] = {role: [] for role in roles}
    async with moving_client(PAGES, LIMIT_BYTES) as client:
        await client.paged.write_all()
        for role in roles:
            usual = await usual_seconds(client)  # anew: a machine is not as busy all the time
            for seed in seeds:
                killed = await kill_in_move(client, role, seed, usual)
                found[role].append(killed)
                if not quiet:
                    print(
                        f"{role} {seed}: after {killed.after_seconds:.2f} of {usual:.2f} s, {killed.stage}; "
                        f"longest command {killed.longest_seconds * 1000:.0f} ms, "
                        f"{killed.wrong_pages} wrong pages",
                        file=sys.stderr,
                        flush=True,
                    )
    return found


def table(found: dict[Role, list[Killed]]) -> str:
    """Return what the kills came to, in Markdown."""
    lines = [
        "| killed | times | while it was | longest command, ms | wrong pages |",
        "| --- | --- | --- | --- | --- |",
    ]
    for role, kills in found.items():
        stages = Counter(killed.stage for killed in kills)
        lines.append(
            f"| {role} | {len(kills)} | {', '.join(f'{stage} {times}' for stage, times in stages.items())} | "
            f"{max(killed.longest_seconds for killed in kills) * 1000:.0f} | "
            f"{sum(killed.wrong_pages for killed in kills)} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run it and print what it found; the exit status is 1 when a page was wrong or a volume not whole."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.moves",
        description="Kills parts of moves by an intermediate client, while the client verifies its pages.",
    )
    parser.add_argument("--seeds", default=f"1-{INSTANTS}", metavar="FIRST-LAST", help="(%(default)s)")
    parser.add_argument("--roles", nargs="+", type=Role, choices=list(Role), default=list(Role))
    parser.add_argument("--quiet", action="store_true", help="do not tell of each kill")
    words = parser.parse_args()
    first, _, last = words.seeds.partition("-")
    found = asyncio.run(run(words.roles, range(int(first), int(last or first) + 1), quiet=words.quiet))
    print(f"{describe_machine()}; {describe_placement()}\n\n{table(found)}")
    return int(any(killed.wrong_pages for kills in found.values() for killed in kills))


if __name__ == "__main__":
    sys.exit(main())
