"""Handing a client over from one hypervisor to another, as the definition has it: pure rules.

    attached at A --release--> released, nobody's --adopt--> released, B's --claim--> attached at B

Each arrow is one compare-and-swap. Up to the first the client is A's, after it no page of it is anywhere
but on its devices; the second gives it to one hypervisor, under a raised epoch and a new token, so that
whoever had it before is fenced; the third is the attachment that begins with the handed-over page table. Any
claim ends a release: pages may have been changed since, so the stored table is of no use any more.
"""

from __future__ import annotations

from dataclasses import dataclass

from farpage.definition.errors import NotTheOwner
from farpage.definition.model import ClientRecord, Definition, Release
from farpage.definition.rules import claim, client_of, next_revision
from farpage.errors import ExitStatus, FarpageError


@dataclass(eq=False)
class ClientReleased(FarpageError):
    """The client has been released and is nobody's, or not this hypervisor's."""

    code = "client_released"
    template = "client {client!r} has been released by hypervisor {hypervisor!r}{adopted}"
    remedy = "{hint}"
    exit_status = ExitStatus.CONFLICT
    client: str
    hypervisor: str
    adopted: str
    hint: str


@dataclass(eq=False)
class ClientNotReleased(FarpageError):
    """The client's pages are not all on its devices, or nobody has said so."""

    code = "client_not_released"
    template = "client {client!r} has not been released: hypervisor {hypervisor!r} has it"
    remedy = (
        "release it there first with 'farpage client release {client}'; if that hypervisor is lost for good, "
        "what was in its memory is too, and 'farpage client attach' takes the client over without content"
    )
    exit_status = ExitStatus.CONFLICT
    client: str
    hypervisor: str


def release(definition: Definition, name: str, owner: str, epoch: int, released: Release) -> Definition:
    """Record that every page of a client is on its devices and its page table is stored beside them.

    `owner` and `epoch` are those of who has it; the client's epoch rises to that.

    :raise ClientMissing: there is none.
    :raise NotTheOwner: somebody else has claimed the client.
    """
    client = client_of(definition, name)
    if client.owner != owner:
        raise NotTheOwner(name, client.epoch)
    return _with(definition, name, client, released=released, epoch=max(client.epoch, epoch))


def adopt(
    definition: Definition, name: str, owner: str, hypervisor: str, at_least: int = 0, *, force: bool = False
) -> Definition:
    """Give a released client to a hypervisor: as a claim, but the stored page table stays in force.

    With `force` also one that another hypervisor has adopted and not attached yet.

    :raise ClientMissing: there is none.
    :raise ClientNotReleased: somebody has it.
    :raise ClientReleased: another hypervisor has adopted it.
    """
    client = client_of(definition, name)
    released = client.released
    if released is None:
        raise ClientNotReleased(name, client.hypervisor)
    if released.adopter not in ("", hypervisor) and not force:
        raise refusal(name, released, hypervisor)
    kept = released.model_copy(update={"adopter": hypervisor})
    claimed = claim(definition, name, owner, hypervisor, at_least)
    return _with(definition, name, client_of(claimed, name), released=kept)


def take_back(definition: Definition, name: str, owner: str) -> Definition:
    """Undo a release that its maker could not finish, while nobody has adopted the client.

    The document is left as it is when there is nothing to undo.
    """
    client = definition.clients.get(name)
    if client is None or client.released is None or client.released.adopter or client.owner != owner:
        return definition
    return _with(definition, name, client, released=None)


def restore(definition: Definition, name: str, owner: str, released: Release) -> Definition:
    """Put a release in force again after an attachment under `owner`'s claim that has changed no page.

    :raise ClientMissing: there is none.
    :raise NotTheOwner: somebody else has claimed the client since.
    """
    client = client_of(definition, name)
    if client.owner != owner:
        raise NotTheOwner(name, client.epoch)
    return _with(definition, name, client, released=released)


def refusal(name: str, released: Release, hypervisor: str) -> ClientReleased:
    """Say why a hypervisor that has not adopted a released client may not do something with it."""
    if not released.adopter:
        hint = f"adopt it here first: 'farpage client adopt {name}'"
        return ClientReleased(name, released.hypervisor, "", hint)
    if released.adopter == hypervisor:
        hint = f"attach it: 'farpage client attach {name} --pid PID'"
    else:
        hint = (
            f"attach it there; if hypervisor {released.adopter!r} is lost, "
            f"take it with 'farpage client adopt {name} --force'"
        )
    return ClientReleased(name, released.hypervisor, f" and adopted by {released.adopter!r}", hint)


def _with(definition: Definition, name: str, client: ClientRecord, **changes: object) -> Definition:
    changed = client.model_copy(update=changes)
    return next_revision(definition, clients={**definition.clients, name: changed})
