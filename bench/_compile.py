"""Compiles the benchmarks' programs in C, each one file beside this one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from farpage.errors import Unsupported

_FLAGS: Final = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread")


def compiled(name: str, folder: Path, libraries: Sequence[str] = ()) -> Path:
    """Compile `name`.c into `folder` and return the program.

    :raise Unsupported: there is no C compiler, or it refuses.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unsupported("a C compiler", "neither cc nor gcc is in PATH", "install gcc and libc6-dev")
    source, program = Path(__file__).with_name(f"{name}.c"), folder / name
    done = subprocess.run(
        [compiler, *_FLAGS, "-o", str(program), str(source), *libraries],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        first = (done.stderr.strip().splitlines() or ["it says nothing"])[0]
        raise Unsupported(f"{name}.c", f"{compiler} fails: {first}", "install libc6-dev")
    return program
