"""A guest under QEMU, whose memory farpage can page: shared memfd, no disk, no network, a serial console."""

from __future__ import annotations

import asyncio
import shutil
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from farpage.attach import qmp
from farpage.errors import FarpageError
from farpage.guest.image import GuestImage, commands_archive
from farpage.guest.reports import CommandDone, Ended, Failed, Report, parse_report

_SERIAL_LINES_KEPT = 1000
_SERIAL_LINE_KEPT_CHARACTERS = 500
_QUIT_TIMEOUT_SECONDS = 5.0
_LINE_LIMIT_BYTES = 64 << 10


@dataclass(eq=False)
class GuestFailed(FarpageError):
    """The guest ended, or did not report in time."""

    code = "guest_failed"
    template = "the QEMU guest {problem}; its console ended with: {console}"
    remedy = "see {log} for QEMU's own messages"
    problem: str
    console: str
    log: str


@dataclass(frozen=True)
class GuestOptions:
    """What the guest is and does."""

    memory_mib: int = 512
    fill_mib: int = 300
    """How much of it the verifier fills and checks."""
    rewrite_percent: int = 25
    """How much of that each pass writes anew, in steps of 25."""
    passes: int = 0
    """How often it verifies; 0 is without end."""
    commands: tuple[str, ...] = ()
    """Shell commands to run, one after another, instead of verifying."""
    single_threaded: bool = False
    """TCG has no thread of its own for the virtual CPU: slower, but more likely to survive a pre-copy."""
    incoming: bool = False
    """It does not boot, but waits for another one of the same options to be migrated into it."""


def qemu_command(image: GuestImage, options: GuestOptions, initramfs: Path, qmp_socket: str) -> list[str]:
    """Return the command line; the guest's console is QEMU's standard output."""
    size = f"{options.memory_mib}M"
    kernel_options = (
        "console=ttyS0 quiet panic=-1 "
        f"farpage.fill_mib={options.fill_mib} "
        f"farpage.rewrite_percent={options.rewrite_percent} "
        f"farpage.passes={options.passes}"
    )
    return [
        "qemu-system-x86_64",
        *("-accel", "tcg,thread=single" if options.single_threaded else "tcg"),
        *("-machine", "pc,memory-backend=ram"),
        *("-m", size),
        *("-object", f"memory-backend-memfd,id=ram,size={size},share=on"),
        *("-kernel", str(image.kernel), "-initrd", str(initramfs), "-append", kernel_options),
        *("-nodefaults", "-no-reboot", "-display", "none"),
        *("-serial", "stdio"),
        *("-qmp", f"unix:{qmp_socket},server=on,wait=off"),
        *(("-incoming", "defer") if options.incoming else ()),
    ]


class QemuGuest:
    """One running guest; `async with QemuGuest(...)` starts it and never leaves its process behind.

    Its console is read all the time, so the guest never waits for its reader.
    """

    def __init__(self, image: GuestImage, options: GuestOptions, folder: Path) -> None:
        """`folder` exists, takes the QMP socket and the log, and has a path short enough for a socket."""
        self._image = image
        self._options = options
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._ended = False
        self.reports: list[Report] = []
        """All reports so far."""
        self.console: deque[str] = deque(maxlen=_SERIAL_LINES_KEPT)
        """The console's last lines."""

    @property
    def pid(self) -> int:
        """Process number of QEMU."""
        if self._process is None:
            raise RuntimeError("the guest was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether QEMU is alive."""
        return self._process is not None and self._process.returncode is None

    @property
    def log(self) -> Path:
        """QEMU's own messages."""
        return self._folder / "qemu.log"

    @property
    def qmp_socket(self) -> str:
        """Path of its QMP socket, which serves one connection at a time."""
        return str(self._folder / "qmp.sock")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start QEMU and return at once; wait for `Started` or `Filled` with `wait_for`."""
        command = qemu_command(self._image, self._options, self._make_initramfs(), self.qmp_socket)
        # QEMU dies with this process, also when that is killed. (prctl(2), PR_SET_PDEATHSIG)
        if shutil.which("setpriv"):
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=_LINE_LIMIT_BYTES,
                # Ctrl-C in a terminal is for the program that runs the guest.
                start_new_session=True,
            )
        self._reading = asyncio.get_running_loop().create_task(self._read_console(self._process))

    def _make_initramfs(self) -> Path:
        if not self._options.commands:
            return self._image.initramfs
        path = self._folder / "initramfs"
        path.write_bytes(self._image.initramfs.read_bytes() + commands_archive(self._options.commands))
        return path

    async def _read_console(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while True:
                try:
                    line = await process.stdout.readline()
                except ValueError:
                    # A line beyond the limit: what was buffered of it is dropped.
                    continue
                if not line:
                    break
                await self._take(line.decode(errors="replace").rstrip())
        finally:
            self._ended = True
            async with self._changed:
                self._changed.notify_all()

    async def _take(self, line: str) -> None:
        # Programs that draw with backspaces make lines of many KiB.
        self.console.append(line[-_SERIAL_LINE_KEPT_CHARACTERS:])
        report = parse_report(line)
        if report is not None:
            async with self._changed:
                self.reports.append(report)
                self._changed.notify_all()

    async def wait_for(self, wanted: Callable[[Report], bool], timeout_seconds: float) -> Report:
        """Return the first report, of those that came already and those to come, that is `wanted`.

        :raise GuestFailed: when the guest ends, reports a failure, or `timeout_seconds` pass before.
        """
        seen = 0
        try:
            async with asyncio.timeout(timeout_seconds), self._changed:
                while True:
                    for report in self.reports[seen:]:
                        if wanted(report):
                            return report
                        if isinstance(report, Failed):
                            raise self._failed(f"failed ({report.cause})")
                    seen = len(self.reports)
                    if self._ended:
                        raise self._failed("ended")
                    await self._changed.wait()
        except TimeoutError as error:
            raise self._failed(f"did not report in {timeout_seconds:g} s") from error

    async def command_statuses(self, timeout_seconds: float) -> list[int]:
        """Wait for a guest with `commands` to end them all, and return their exit statuses.

        :raise GuestFailed: when that takes longer than `timeout_seconds`.
        """
        await self.wait_for(lambda report: isinstance(report, Ended), timeout_seconds)
        return [report.status for report in self.reports if isinstance(report, CommandDone)]

    def _failed(self, problem: str) -> GuestFailed:
        return GuestFailed(problem, " | ".join(list(self.console)[-5:]) or "(nothing)", str(self.log))

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command of QEMU's machine protocol, such as `stop`, `cont` or `query-status`.

        :raise QmpFailed: when QEMU refuses it or is gone.
        """
        return await qmp.execute(self.qmp_socket, command, **arguments)

    async def stop(self) -> None:
        """End QEMU: by QMP, else by SIGKILL; a guest that has ended is fine."""
        process = self._process
        if process is None:
            return
        try:
            if process.returncode is None:
                with suppress(FarpageError, TimeoutError):
                    async with asyncio.timeout(_QUIT_TIMEOUT_SECONDS):
                        await self.qmp("quit")
                        await process.wait()
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
            await process.wait()
            if self._reading is not None:
                await self._reading
