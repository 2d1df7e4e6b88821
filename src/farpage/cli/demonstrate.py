"""What `farpage demo` does: chooses the guest and the view, runs, says what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from farpage.cli.output import console, print_json, print_text
from farpage.cli.wording.demo import details
from farpage.demo.guests import RegionGuest
from farpage.demo.run import Demo, DemoSettings, MakeGuest
from farpage.demo.stamps import PAGE_BYTES
from farpage.demo.verdict import DemoResult, Verdict
from farpage.demo.view import LineView, View, live_view
from farpage.errors import ExitStatus, InvalidInput

QEMU = "qemu-system-x86_64"


def run_demo(
    *,
    guest: str | None,
    memory_bytes: int,
    fill_bytes: int,
    limit_bytes: int,
    state: Path | None,
    as_json: bool,
) -> ExitStatus:
    """Run the demo and print its result.

    :raise InvalidInput: naming the option that is wrong.
    """
    make_guest = _choose_guest(guest)
    _check_sizes(memory_bytes, fill_bytes, limit_bytes)
    with _state_folder(state) as folder, _view(as_json) as view:
        settings = DemoSettings(folder, make_guest, memory_bytes, fill_bytes, limit_bytes)
        try:
            result = asyncio.run(_run(settings, view))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    if as_json:
        print_json(result)
    else:
        print_text("", *details(result))
    return ExitStatus.OK if result.verdict is Verdict.OK else ExitStatus.FAILURE


async def _run(settings: DemoSettings, view: View) -> DemoResult:
    task = asyncio.current_task()
    assert task is not None
    # As for Ctrl-C: everything is cleaned up on the way out.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await Demo(settings, view).run()


def _choose_guest(guest: str | None) -> MakeGuest:
    if guest is None and shutil.which(QEMU) is None:
        sys.stderr.write(f"{QEMU} is not installed, so the guest is a process with a Region (--guest none)\n")
        return RegionGuest
    if guest in (None, "qemu"):
        from farpage.demo.qemu import VirtualGuest

        return VirtualGuest
    if guest == "none":
        return RegionGuest
    raise InvalidInput("--guest", f"{guest!r} is no guest", "use qemu or none")


def _check_sizes(memory_bytes: int, fill_bytes: int, limit_bytes: int) -> None:
    for option, size_bytes in (("--memory", memory_bytes), ("--fill", fill_bytes), ("--limit", limit_bytes)):
        if size_bytes % PAGE_BYTES:
            raise InvalidInput(option, f"{size_bytes} is no whole number of pages", "use a multiple of 4K")
    if fill_bytes >= memory_bytes:
        raise InvalidInput("--fill", "it leaves the guest no memory of its own", "use less than --memory")
    if limit_bytes >= fill_bytes:
        raise InvalidInput("--limit", "nothing would be paged out", "use less than --fill")


@contextlib.contextmanager
def _state_folder(state: Path | None) -> Iterator[Path]:
    """Give the folder that was named, or one that exists while the demo runs."""
    if state is not None:
        folder = state.expanduser().absolute()
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not folder.is_dir():
            raise InvalidInput("--state", f"{folder} is no folder", "name one that you can write to")
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="farpage-demo-", ignore_cleanup_errors=True) as name:
            yield Path(name)


@contextlib.contextmanager
def _view(as_json: bool) -> Iterator[View]:
    if as_json:
        yield LineView(sys.stderr)
    elif not sys.stdout.isatty():
        yield LineView(sys.stdout)
    else:
        with live_view(console()) as view:
            yield view
