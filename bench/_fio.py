"""Runs fio, the client of the benchmarks of NBD servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from bench._nbd_cases import FIO_OPTIONS, Work


async def run(
    jobs: Sequence[str],
    work: Work,
    *,
    depth: int,
    size_bytes: int,
    seconds: float,
    folder: Path,
    before: Sequence[str] = (),
) -> float:
    """Return the commands a second of all jobs together.

    `jobs` are options from a `--name` on, one for each job; `before` comes before the command line. What fio
    leaves behind goes to `folder`.
    """
    process = await asyncio.create_subprocess_exec(
        *before,
        "fio",
        *FIO_OPTIONS[work],
        f"--iodepth={depth}",
        f"--size={size_bytes}",
        "--time_based",
        f"--runtime={seconds * 1000:.0f}ms",
        "--group_reporting",
        "--output-format=json",
        *jobs,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
    )
    output, complaints = await process.communicate()
    if process.returncode:
        raise SystemExit(f"fio ended with status {process.returncode}: {complaints.decode()}")
    (job,) = json.loads(output[output.index(b"{") :])["jobs"]
    return float(job["read"]["iops"]) + float(job["write"]["iops"])
