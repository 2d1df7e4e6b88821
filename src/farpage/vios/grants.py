"""Who may open what by the token of a principal: what the definition grants. Pure."""

from __future__ import annotations

from farpage.definition.model import Access, Definition
from farpage.definition.moving import may
from farpage.vios.copying.errors import NotGranted
from farpage.vios.names import ExportName


def needed_grants(wanted: ExportName) -> tuple[Access, ...]:
    """Return the grants of which a principal needs one to open an export."""
    if wanted.source:
        return (Access.FILL,)
    return (Access.READ, Access.WRITE) if wanted.epoch is None else (Access.WRITE,)


def authorize(definition: Definition, wanted: ExportName) -> None:
    """Refuse a principal without a grant; who names none is let through.

    :raise NotGranted:
    """
    if wanted.principal:
        needed = needed_grants(wanted)
        if not may(definition, wanted.principal, wanted.volume, wanted.device, *needed):
            raise NotGranted(wanted.volume, wanted.principal, needed[0], wanted.device or "any")
