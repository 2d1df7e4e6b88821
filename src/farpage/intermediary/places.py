"""A VIOS as an intermediate client uses it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from farpage.address import Address, TcpAddress, parse_address
from farpage.api.client import ControlClient
from farpage.definition.model import Definition, ViosRecord
from farpage.vios.model import Health

TIMEOUT_SECONDS: Final = 2.0
"""A VIOS that takes longer is treated as away for the moment."""
WILDCARDS: Final = ("0.0.0.0", "::", "")


@dataclass
class Place:
    """One VIOS: its control client, and the definition that it stored when it was last asked."""

    name: str
    control: str
    tls: Path | None = None
    client: ControlClient = field(init=False)
    definition: Definition | None = None
    problem: str = "not asked yet"

    def __post_init__(self) -> None:
        self.client = ControlClient(
            self.control, who=f"VIOS {self.name}", timeout_seconds=TIMEOUT_SECONDS, tls=self.tls
        )

    async def refresh(self, *, anew: bool = False) -> Definition:
        """Return the definition that it stores, which is fetched when its revision has changed, or `anew`.

        :raise FarpageError: it does not answer, or not as it should.
        """
        if not anew and self.definition is not None:
            health = await self.client.get("/v1/health", Health)
            if health.definition_revision == self.definition.revision:
                return self.definition
        self.definition = await self.client.get("/v1/definition", Definition)
        return self.definition

    async def put(self, expected_revision: int, definition: Definition) -> None:
        """Replace the definition that it stores.

        :raise RemoteError: it stores another one than expected.
        """
        await self.client.put(
            "/v1/definition", definition, Definition, params={"expected_revision": expected_revision}
        )


def data_addresses(record: ViosRecord, control: str) -> tuple[Address, ...]:
    """Return the NBD addresses of a VIOS whose control API is reached at `control`.

    UNIX sockets are of use where that one is, on the VIOS's own host; a port at every address of the VIOS's
    host is one at that which its control API is reached at.
    """
    reached = parse_address(control)
    found: list[Address] = []
    for address in map(parse_address, record.data):
        if isinstance(address, TcpAddress):
            host = reached.host if isinstance(reached, TcpAddress) else "127.0.0.1"
            found.append(TcpAddress(host, address.port) if address.host in WILDCARDS else address)
        elif not isinstance(reached, TcpAddress):
            found.append(address)
    return tuple(found)
