"""`farpage client`: the virtual clients of the hypervisor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farpage.cli.commands import client_moves
from farpage.cli.options import AsJson, State, size_option

app = typer.Typer(name="client", help="Virtual clients: VMs and processes whose memory is paged.")

ClientName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the client.")]
Memory = Annotated[int, size_option("--memory", "Size of the client's memory.")]
Limit = Annotated[
    int | None, size_option("--limit", "Memory that may be resident; what is above it is paged out.")
]
Entitlement = Annotated[
    int | None, size_option("--entitlement", "Memory that the client keeps, however short the pool is.")
]


@app.command("create", epilog="Example: farpage client create web1 --memory 512M --limit 128M")
def create(
    name: ClientName,
    *,
    memory: Memory,
    limit: Limit = None,
    entitlement: Entitlement = None,
    weight: Annotated[
        int, typer.Option("--weight", help="0 to 255; a higher weight loses memory later.")
    ] = 128,
    redundancy: Annotated[
        str, typer.Option("--redundancy", metavar="none|path|mirror", help="What the volume survives.")
    ] = "path",
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Make a client and its volume; its memory is attached later."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import wanted
    from farpage.cli.wording.client import created
    from farpage.hypervisor.model import ClientCreate

    document = wanted(
        ClientCreate,
        name=name,
        memory_bytes=memory,
        limit_bytes=limit,
        entitlement_bytes=entitlement or 0,
        weight=weight,
        redundancy=redundancy,
    )
    info = ask_hypervisor(state, lambda hypervisor: hypervisor.create_client(document))
    print_json(info) if as_json else print_text(created(info))


@app.command("attach", epilog="Example: farpage client attach web1 --pid 4711 --limit 128M")
def attach(
    name: ClientName,
    *,
    pid: Annotated[
        int, typer.Option("--pid", help="Process of the running VM; its memory is a shared memfd.")
    ],
    limit: Limit = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="NAME", help="The memory to page, where the process has several."),
    ] = None,
    qmp: Annotated[
        Path | None,
        typer.Option(
            "--qmp", metavar="SOCKET", help="QMP socket for farpage alone: pauses the VM while no path works."
        ),
    ] = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Page the memory of a running process; makes the client when it does not exist."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import named, wanted
    from farpage.cli.wording.client import attached
    from farpage.hypervisor.model import ClientAttach

    socket = None if qmp is None else str(qmp.expanduser().absolute())
    document = wanted(ClientAttach, pid=pid, memory=memory, qmp=socket, limit_bytes=limit)
    info = ask_hypervisor(state, lambda hypervisor: hypervisor.attach(named(name), document))
    print_json(info) if as_json else print_text(attached(info))


@app.command("detach", epilog="Example: farpage client detach web1")
def detach(name: ClientName, state: State = None, as_json: AsJson = False) -> None:
    """Page everything back in and let go of the process, which runs on; waits until that is done."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import named
    from farpage.cli.wording.client import detached

    info = ask_hypervisor(state, lambda hypervisor: hypervisor.detach(named(name)))
    print_json(info) if as_json else print_text(detached(info))


@app.command("release", epilog="Example: farpage client release web1 --qmp /run/web1.qmp")
def release(
    name: ClientName,
    *,
    qmp: Annotated[
        Path | None,
        typer.Option("--qmp", metavar="SOCKET", help="QMP socket of the VM; it is stopped by it if it runs."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Though its process runs: it waits at its memory from then on.")
    ] = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Bring every page of a stopped client to its devices and let go of it, for another hypervisor to adopt.

    Nothing is read back. End the VM or process afterwards: accesses to its memory wait for good.
    """
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import named, wanted
    from farpage.cli.wording.client import released
    from farpage.hypervisor.model import ClientRelease

    socket = None if qmp is None else str(qmp.expanduser().absolute())
    document = wanted(ClientRelease, qmp=socket, force=force)
    info = ask_hypervisor(state, lambda hypervisor: hypervisor.release(named(name), document))
    print_json(info) if as_json else print_text(released(info))


@app.command("adopt", epilog="Example: farpage client adopt web1")
def adopt(
    name: ClientName,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also from a hypervisor that adopted it and has not attached it.")
    ] = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Take a client that a hypervisor has released; attached here, it goes on with all of its pages."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import named, wanted
    from farpage.cli.wording.client import adopted
    from farpage.hypervisor.model import ClientAdopt

    document = wanted(ClientAdopt, force=force)
    info = ask_hypervisor(state, lambda hypervisor: hypervisor.adopt(named(name), document))
    print_json(info) if as_json else print_text(adopted(info))


@app.command("scrub", epilog="Example: farpage client scrub web1 --rate 200M")
def scrub(
    name: ClientName,
    *,
    rate: Annotated[
        int | None,
        size_option("--rate", "The most that is read from each replica per second; 64M by default."),
    ] = None,
    background: Annotated[
        bool, typer.Option("--background", help="Begin only; 'farpage client show NAME' tells how far it is.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the scrub that runs.")] = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Read every paged-out page from every replica, compare it with its checksum, and repair it.

    Waits for the end, which Ctrl-C does not bring about; exits with 1 when a page is right nowhere.
    """
    from farpage.cli.output import print_json, print_text
    from farpage.cli.scrubbing import run_scrub, stop_scrub
    from farpage.cli.wanted import named
    from farpage.cli.wording.client import scrub_stopped, scrubbed

    if stop:
        info, say = stop_scrub(state, named(name)), scrub_stopped
    else:
        info, say = run_scrub(state, named(name), rate, wait=not background), scrubbed
    print_json(info) if as_json else print_text(say(info))
    if info.scrub and info.scrub.lost_pages:
        raise typer.Exit(1)


@app.command("delete", epilog="Example: farpage client delete web1")
def delete(name: ClientName, state: State = None) -> None:
    """Remove a detached client and its volume."""
    from farpage.cli.output import print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import named

    ask_hypervisor(state, lambda hypervisor: hypervisor.delete_client(named(name)))
    print_text(f"client {name} deleted")


@app.command("list", epilog="Example: farpage client list --json")
def list_clients(state: State = None, as_json: AsJson = False) -> None:
    """List the clients."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wording.client import overview

    clients = ask_hypervisor(state, lambda hypervisor: hypervisor.clients())
    print_json(clients) if as_json else print_text(overview(clients))


@app.command("show", epilog="Example: farpage client show web1")
def show(name: ClientName, state: State = None, as_json: AsJson = False) -> None:
    """Show one client: its memory, paths, counters and failovers."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import named
    from farpage.cli.wording.client import details

    info = ask_hypervisor(state, lambda hypervisor: hypervisor.client(named(name)))
    print_json(info) if as_json else print_text(*details(info))


client_moves.add_to(app)
