"""The control API of a `farpage up`: what can be asked of the process that runs a set's daemons."""

from __future__ import annotations

import asyncio
from typing import Annotated

from farpage import __version__
from farpage.api.errors import create_app
from farpage.api.framework import FastAPI, Path
from farpage.definition.model import Name
from farpage.embedded.model import ViosStarted
from farpage.embedded.set import EmbeddedSet


def create_api(embedded: EmbeddedSet, loop: asyncio.AbstractEventLoop) -> FastAPI:
    """Make the API of a set that is used from `loop`."""
    app = create_app("farpage set", __version__)

    async def start(name: str) -> ViosStarted:
        was_running = embedded.vios_pid(name) is not None
        await embedded.start_vios(name)
        await embedded.tell_hypervisor()
        return ViosStarted(vios=name, pid=embedded.vios_pid(name) or 0, was_running=was_running)

    @app.post("/v1/vioses/{name}/start")
    async def start_vios(name: Annotated[Name, Path(description="Name of the VIOS")]) -> ViosStarted:
        """Start a VIOS that was stopped; answered when the hypervisor uses it. One that runs is left be."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(start(name), loop))

    return app
