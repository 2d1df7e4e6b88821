"""`farpage pool`: the memory that the clients share."""

from __future__ import annotations

from typing import Annotated

import typer

from farpage.cli.options import AsJson, State, size_option

app = typer.Typer(name="pool", help="The memory pool: RAM that the clients share.")


@app.command("show", epilog="Example: farpage pool show")
def show(state: State = None, as_json: AsJson = False) -> None:
    """Show the pool and every client's share of it."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wording.pool import details

    pool = ask_hypervisor(state, lambda hypervisor: hypervisor.pool())
    print_json(pool) if as_json else print_text(*details(pool))


@app.command("set", epilog="Example: farpage pool set --client web1 --limit 256M")
def set_pool(
    size: Annotated[int | None, size_option("--size", "Size of the pool.")] = None,
    client: Annotated[
        str | None, typer.Option("--client", metavar="NAME", help="The client that --limit is for.")
    ] = None,
    limit: Annotated[int | None, size_option("--limit", "Memory of the client that may be resident.")] = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Change the pool's size, or one client's limit."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import wanted
    from farpage.cli.wording.pool import details
    from farpage.errors import InvalidInput
    from farpage.hypervisor.model import PoolSet

    if (client is None) != (limit is None):
        raise InvalidInput("--client and --limit", "one without the other", "give both, or --size alone")
    if size is None and client is None:
        raise InvalidInput("pool set", "nothing to set", "give --size, or --client and --limit")
    document = wanted(PoolSet, size_bytes=size, client=client, limit_bytes=limit)
    pool = ask_hypervisor(state, lambda hypervisor: hypervisor.set_pool(document))
    print_json(pool) if as_json else print_text(*details(pool))
