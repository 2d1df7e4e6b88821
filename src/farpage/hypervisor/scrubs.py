"""Scrubs of clients: begun and ended on request, and begun anew where their worker was lost."""

from __future__ import annotations

from farpage.errors import FarpageError
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.errors import ClientNotAttached
from farpage.log import get_logger
from farpage.pager.messages import StartScrub, StopScrub

log = get_logger()


class Scrubs:
    """The scrubs of the clients of one hypervisor; which are under way stands in the run folder."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    async def start(self, client: str, rate_bytes: int) -> None:
        """Begin to compare what every replica holds with what was paged out.

        :raise ClientNotAttached: only then is it known what that is.
        :raise FarpageError: it is being scrubbed already.
        """
        attached = self._attached(client)
        order = StartScrub(client=client, rate_bytes=rate_bytes)
        await self._clients.command(client, attached, "start_scrub", order)
        self._remember(client, rate_bytes)

    async def stop(self, client: str) -> None:
        """End a client's scrub, if one runs.

        :raise ClientNotAttached: nothing pages it.
        """
        attached = self._attached(client)
        # First: should its worker be lost, the next one does not begin it anew.
        self._remember(client, None)
        await self._clients.command(client, attached, "stop_scrub", StopScrub(client=client))

    def ended(self, client: str) -> None:
        """Take note that a scrub has come to its end."""
        self._remember(client, None)

    async def begin_anew(self, client: str, attached: Attached) -> None:
        """Begin the scrub again that was under way when a client's worker was lost."""
        rate_bytes = attached.record.scrub_rate_bytes
        if rate_bytes is None:
            return
        order = StartScrub(client=client, rate_bytes=rate_bytes)
        try:
            await self._clients.command(client, attached, "start_scrub", order)
        except FarpageError as error:
            log.warning("scrub_not_begun_anew", client=client, problem=error.cause)

    def _attached(self, client: str) -> Attached:
        self._clients.records.of(client)
        attached = self._clients.attached.get(client)
        if attached is None:
            raise ClientNotAttached(client)
        return attached

    def _remember(self, client: str, rate_bytes: int | None) -> None:
        attached = self._clients.attached.get(client)
        # One that is being adopted is in the run folder alone.
        record = attached.record if attached else self._clients.run.record(client)
        if record is None or record.scrub_rate_bytes == rate_bytes:
            return
        record = record.model_copy(update={"scrub_rate_bytes": rate_bytes})
        if attached:
            self._clients.keep(attached, record)
        else:
            self._clients.run.save(record)
