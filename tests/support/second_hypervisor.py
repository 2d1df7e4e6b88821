"""Another hypervisor on the VIOSes of a running set."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from farpage.embedded.control import HypervisorControl
from farpage.embedded.layout import SetDocument, StateLayout
from farpage.embedded.set import EmbeddedSet
from farpage.errors import FarpageError
from tests.support.paged_set import DEADLINE_SECONDS


@dataclass
class Other:
    """A second hypervisor, in a state folder of its own."""

    state: Path
    control: HypervisorControl
    document: SetDocument
    command: Sequence[str]
    process: subprocess.Popen[bytes] = field(init=False)

    async def start(self) -> None:
        """Start its control process and wait until that answers."""
        with (self.state / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log, stdout=log)  # noqa: ASYNC220
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await answers(self.control):
                assert self.process.poll() is None, "it ended"
                await asyncio.sleep(0.05)

    async def kill(self) -> None:
        """Kill the control process."""
        self.process.kill()
        await asyncio.to_thread(self.process.wait, DEADLINE_SECONDS)

    async def restart(self) -> None:
        """Kill the control process, and start another one."""
        await self.kill()
        await self.start()

    async def stop(self) -> None:
        """End it in order."""
        await self.control.close()
        self.process.terminate()
        await asyncio.to_thread(self.process.wait, DEADLINE_SECONDS)


@asynccontextmanager
async def second_hypervisor(embedded: EmbeddedSet, *only: str) -> AsyncIterator[Other]:
    """Run another hypervisor on the VIOSes of a set, or on some of them alone."""
    layout = StateLayout.at(embedded.layout.root.parent / "other")
    known = embedded.document.vioses
    vioses = {name: known[name] for name in only or known}
    layout.create_root()
    document = layout.describe(()).model_copy(update={"vioses": vioses})
    layout.create(document)
    arguments = [sys.executable, "-m", "farpage", "hypervisor", "run", "other"]
    arguments += ["--dir", str(layout.hypervisor_dir), "--workers", "1"]
    for name, vios in vioses.items():
        arguments += ["--vios", f"{name}={vios.control}"]
    other = Other(layout.root, HypervisorControl(document.hypervisor.control), document, arguments)
    try:
        await other.start()
        yield other
    finally:
        await other.stop()


async def answers(control: HypervisorControl) -> bool:
    try:
        await control.info()
    except FarpageError:
        return False
    return True
