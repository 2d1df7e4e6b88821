"""Releases that an attachment was to begin with and has not, while no VIOS answers and later."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from farpage.attach.memory import ClientKind
from farpage.definition.model import Release
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import NoVios
from farpage.hypervisor.errors import ClientBusy
from farpage.hypervisor.handovers import kept
from farpage.hypervisor.runfolder import RunFolder
from farpage.hypervisor.unstarted import UnstartedReleases
from farpage.kernel.process import ProcessIdentity
from farpage.pager.attachmentrecord import AttachmentRecord

RELEASE = Release(hypervisor="away", epoch=3, digest="ab" * 32, adopter="host")
RECORD = AttachmentRecord(
    client="vm1",
    kind=ClientKind.PROCESS,
    process=ProcessIdentity(pid=7, started_ticks=123, boot="b"),
    handover=kept(RELEASE),
)


class Hypervisor:
    """Clients and records of one whose VIOSes may be away."""

    def __init__(self, folder: Path) -> None:
        self.run = RunFolder(folder)
        self.records = self
        self.away = self.busy = False
        self.restored: list[tuple[str, Release]] = []
        self.unstarted = UnstartedReleases(cast(Clients, self))

    async def restore(self, client: str, released: Release) -> None:
        if self.away:
            raise NoVios("none answers")
        self.restored.append((client, released))

    @asynccontextmanager
    async def only(self, client: str, what: str) -> AsyncIterator[None]:
        if self.busy:
            raise ClientBusy(client, "attach")
        yield


async def test_one_is_owed_until_a_vios_stores_it_and_by_the_next_control_process_too(tmp_path: Path) -> None:
    hypervisor = Hypervisor(tmp_path)
    hypervisor.away = True
    hypervisor.unstarted.owe(RECORD)
    with pytest.raises(NoVios):
        await hypervisor.unstarted.put_back("vm1")
    await hypervisor.unstarted.put_back_all()
    assert list(hypervisor.run.records()) == [RECORD]
    hypervisor.away = False
    await hypervisor.unstarted.put_back_all()
    assert hypervisor.restored == [("vm1", RELEASE)]
    assert list(hypervisor.run.records()) == []
    await hypervisor.unstarted.put_back_all()
    await hypervisor.unstarted.put_back("vm1")
    assert hypervisor.restored == [("vm1", RELEASE)]
    hypervisor.run.close()


async def test_one_whose_client_is_being_attached_is_left_to_that(tmp_path: Path) -> None:
    hypervisor = Hypervisor(tmp_path)
    hypervisor.unstarted.owe(RECORD)
    hypervisor.busy = True
    await hypervisor.unstarted.put_back_all()
    assert hypervisor.restored == []
    await hypervisor.unstarted.put_back("vm1")
    assert hypervisor.restored == [("vm1", RELEASE)]
    hypervisor.run.close()
