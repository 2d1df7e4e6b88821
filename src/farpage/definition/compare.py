"""Which of several VIOS' documents is the one to follow, and what they differ in: pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from farpage.definition.document import canonical_json
from farpage.definition.model import Definition, Grant


@dataclass(frozen=True)
class Lagging:
    """A VIOS whose document is not the newest."""

    vios: str
    revision: int
    contradicts: bool
    """Not just older: another content at the newest revision, or a higher revision by an older owner."""


@dataclass(frozen=True)
class Comparison:
    """The document to follow, a VIOS that has it, and those that do not."""

    newest: Definition
    vios: str
    lagging: tuple[Lagging, ...]


def is_newer(one: Definition, other: Definition) -> bool:
    """Tell whether `one` goes before `other`: by promotion, the epochs of clients that both have, revision.

    What an operator has promoted goes before whatever comes to light later.
    A document in which some client's epoch is higher, and none lower, comes from the later owner.
    Two documents of the same rank go by their text, so that everybody chooses alike.
    """
    if one.promoted_ms != other.promoted_ms:
        return one.promoted_ms > other.promoted_ms
    both = one.clients.keys() & other.clients.keys()
    higher = any(one.clients[name].epoch > other.clients[name].epoch for name in both)
    lower = any(one.clients[name].epoch < other.clients[name].epoch for name in both)
    if higher != lower:
        return higher
    if one.revision != other.revision:
        return one.revision > other.revision
    return canonical_json(one) > canonical_json(other)


def beyond(definition: Definition, attempted: Definition) -> Definition:
    """Return `definition` with revision and epochs so high that it goes before `attempted`.

    `attempted` is a change that may be stored somewhere although nobody has acknowledged it.
    """
    clients = dict(definition.clients)
    for name in clients.keys() & attempted.clients.keys():
        epoch = attempted.clients[name].epoch
        if epoch > clients[name].epoch:
            clients[name] = clients[name].model_copy(update={"epoch": epoch})
    revision = max(definition.revision, attempted.revision + 1)
    if clients == definition.clients and revision == definition.revision:
        return definition
    return definition.model_copy(update={"clients": clients, "revision": revision})


def compare(definitions: Mapping[str, Definition]) -> Comparison:
    """Find the newest of the documents of several VIOS.

    :raise ValueError: there are none.
    """
    if not definitions:
        raise ValueError("no definitions to compare")
    # Latest promotion and highest revision first, so that epochs override only what they contradict.
    order = sorted(
        definitions,
        key=lambda vios: (
            definitions[vios].promoted_ms,
            definitions[vios].revision,
            canonical_json(definitions[vios]),
        ),
        reverse=True,
    )
    best = order[0]
    for vios in order[1:]:
        if is_newer(definitions[vios], definitions[best]):
            best = vios
    newest = definitions[best]
    lagging = tuple(
        Lagging(vios, definition.revision, definition.revision >= newest.revision)
        for vios, definition in sorted(definitions.items())
        if canonical_json(definition) != canonical_json(newest)
    )
    return Comparison(newest, best, lagging)


def diff(old: Definition, new: Definition) -> tuple[str, ...]:
    """Say in lines what changed, for the log: `clients[vm1].epoch: 1 -> 2`."""
    return (
        *_diff_records("vioses", old.vioses, new.vioses),
        *_diff_records("devices", old.devices, new.devices),
        *_diff_records("clients", old.clients, new.clients),
        *_diff_records("moves", old.moves, new.moves),
        *(f"grants: + {_grant(grant)}" for grant in new.grants if grant not in old.grants),
        *(f"grants: - {_grant(grant)}" for grant in old.grants if grant not in new.grants),
    )


def _grant(grant: Grant) -> str:
    """Spell a grant without most of the principal, which may be a token that opens the volume."""
    device = f" on device {grant.device}" if grant.device else ""
    return f"{grant.access} volume {grant.volume}{device} for {grant.principal[:4]}..."


def _diff_records(where: str, old: Mapping[str, BaseModel], new: Mapping[str, BaseModel]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before is None:
            yield f"{where}[{name}]: added"
        elif after is None:
            yield f"{where}[{name}]: removed"
        elif before != after:
            was, now = before.model_dump(mode="json"), after.model_dump(mode="json")
            for key in was:
                if was[key] != now[key]:
                    yield f"{where}[{name}].{key}: {was[key]} -> {now[key]}"
