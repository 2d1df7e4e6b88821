"""Another hypervisor on the VIOSes of a running set."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
    with (layout.root / "log").open("wb") as log:
        process = subprocess.Popen(arguments, stderr=log, stdout=log)  # noqa: ASYNC220
    control = HypervisorControl(document.hypervisor.control)
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await answers(control):
                assert process.poll() is None, "it ended"
                await asyncio.sleep(0.05)
        yield Other(layout.root, control, document)
    finally:
        await control.close()
        process.terminate()
        await asyncio.to_thread(process.wait, DEADLINE_SECONDS)


async def answers(control: HypervisorControl) -> bool:
    try:
        await control.info()
    except FarpageError:
        return False
    return True
