"""From a command line to the daemons: finds the set, connects, runs one action."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from farpage.cli.options import TLS
from farpage.embedded.control import HypervisorControl, SetControl, ViosControl
from farpage.embedded.layout import SetDocument, StateLayout, default_state_dir

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
