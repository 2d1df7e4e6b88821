"""From a command line to the daemons: finds the set, connects, runs one action."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from farpage.cli.options import TLS
from farpage.definition.model import Name
from farpage.embedded.control import HypervisorControl, SetControl, ViosControl
from farpage.embedded.layout import SetDocument, StateLayout, default_state_dir
from farpage.errors import InvalidInput

Result = TypeVar("Result")
Model = TypeVar("Model", bound=BaseModel)


def read_set(state: Path | None) -> SetDocument:
    """Read the description of the set; a folder of certificates named with the command goes before its own.

    :raise NoSet: nothing describes one in the state folder.
    """
    document = StateLayout.at(state or default_state_dir()).read()
    named = TLS.get()
    return document.model_copy(update={"tls": named}) if named else document


def ask_hypervisor(state: Path | None, action: Callable[[HypervisorControl], Awaitable[Result]]) -> Result:
    """Run an action with the set's hypervisor and return what it returns."""
    document = read_set(state)

    async def run() -> Result:
        async with HypervisorControl(document.hypervisor.control, document.tls) as hypervisor:
            return await action(hypervisor)

    return asyncio.run(run())


def ask_set(state: Path | None, action: Callable[[SetControl], Awaitable[Result]]) -> Result:
    """Run an action with the `farpage up` of the state folder and return what it returns."""
    read_set(state)
    address = StateLayout.at(state or default_state_dir()).control

    async def run() -> Result:
        async with SetControl(address) as control:
            return await action(control)

    return asyncio.run(run())


def ask_vios(state: Path | None, name: str, action: Callable[[ViosControl], Awaitable[Result]]) -> Result:
    """Run an action with one VIOS of the set and return what it returns.

    :raise NoSuchVios:
    """
    document = read_set(state)
    address = document.vios(name).control

    async def run() -> Result:
        async with ViosControl(address, name, document.tls) as vios:
            return await action(vios)

    return asyncio.run(run())


def wanted(model: type[Model], **values: object) -> Model:
    """Make a request's document from command line values.

    :raise InvalidInput: naming the value that the document does not accept.
    """
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "request"
        raise InvalidInput(field, f"{first['input']!r}: {first['msg']}", _hint(first["type"])) from problem


def _hint(kind: str) -> str:
    if kind == "string_pattern_mismatch":
        return "use lower-case letters, digits, '.', '_' and '-', at most 63 of them"
    if kind == "multiple_of":
        return "use a whole number of 4096-byte pages, for example 512M"
    return "correct the value; --help shows an example"


def named(name: str) -> str:
    """Return a name that is fit for a request's path.

    :raise InvalidInput: it is no name.
    """
    return wanted(_Named, name=name).name


class _Named(BaseModel):
    name: Name
