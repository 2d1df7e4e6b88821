"""Releases that an attachment was to begin with and has not: they are put in force again.

The attachment's claim has ended the release, and only the definition says which page table is the client's.
So when no VIOS can store that it counts again, this is kept in the run folder and tried until one does.
"""

from __future__ import annotations

from farpage.errors import FarpageError
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.handovers import release_of
from farpage.log import get_logger
from farpage.pager.attachmentrecord import AttachmentRecord

log = get_logger()


class UnstartedReleases:
    """Those of this hypervisor; each is of a client whose attachment has changed no page."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._owed: dict[str, AttachmentRecord] = {}

    def owe(self, record: AttachmentRecord) -> None:
        """Take note of a release that is to be put in force again, now or by the next control process."""
        assert record.handover is not None
        self._owed[record.client] = record
        self._clients.run.save(record)

    async def put_back(self, client: str) -> None:
        """Put a client's release in force again, if that is owed.

        :raise FarpageError: the definition cannot be changed now; it is owed still.
        """
        record = self._owed.get(client)
        if record is None or record.handover is None:
            return
        await self._clients.records.restore(client, release_of(record.handover))
        del self._owed[client]
        self._clients.run.remove(client)

    async def put_back_all(self) -> None:
        """Put back what can be."""
        for client in sorted(self._owed):
            try:
                async with self._clients.only(client, "put its release back"):
                    await self.put_back(client)
            except FarpageError as error:
                log.warning("release_not_restored", client=client, problem=error.cause)
