"""`farpage client move` and what goes with it."""

from __future__ import annotations

from typing import Annotated

import typer

from farpage.cli.options import AsJson, Bandwidth, Indirect, MoveInBackground, State

ClientName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the client.")]


def move(
    name: ClientName,
    *,
    to: Annotated[str, typer.Option("--to", metavar="DEVICE", help="Name of the device that takes it.")],
    indirect: Indirect = False,
    bandwidth: Bandwidth = None,
    background: MoveInBackground = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Bring a client's volume to another device while the client runs.

    Waits for the end, which Ctrl-C does not bring about; exits with 1 when it was cancelled or failed.
    """
    from farpage.cli.moving import run_move
    from farpage.cli.output import print_json, print_text
    from farpage.cli.wanted import named, wanted
    from farpage.cli.wording.move import ended_badly, moved
    from farpage.hypervisor.movement import ClientMove

    order = wanted(ClientMove, to=to, indirect=indirect, bandwidth_bytes=bandwidth)
    info = run_move(state, named(name), order, wait=not background)
    print_json(info) if as_json else print_text(moved(info))
    if ended_badly(info):
        raise typer.Exit(1)


def move_status(name: ClientName, state: State = None, as_json: AsJson = False) -> None:
    """Show how far a client's latest move is, and whether an intermediate client is at work."""
    from farpage.cli.output import print_json, print_text
    from farpage.cli.session import ask_hypervisor
    from farpage.cli.wanted import named
    from farpage.cli.wording.move import details

    info = ask_hypervisor(state, lambda hypervisor: hypervisor.move_progress(named(name)))
    print_json(info) if as_json else print_text(details(info))


def pause_move(name: ClientName, state: State = None, as_json: AsJson = False) -> None:
    """Copy nothing more for now; what the client itself needs goes on."""
    from farpage.cli.moving import adjust_move
    from farpage.cli.output import print_json, print_text
    from farpage.cli.wanted import named
    from farpage.cli.wording.move import moved

    info = adjust_move(state, named(name), paused=True)
    print_json(info) if as_json else print_text(moved(info))


def resume_move(
    name: ClientName,
    *,
    bandwidth: Bandwidth = None,
    unlimited: Annotated[bool, typer.Option("--unlimited", help="Without a bandwidth from now on.")] = False,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a move, or change its bandwidth while it runs."""
    from farpage.cli.moving import adjust_move
    from farpage.cli.output import print_json, print_text
    from farpage.cli.wanted import named
    from farpage.cli.wording.move import moved

    info = adjust_move(state, named(name), paused=False, bandwidth_bytes=bandwidth, unlimited=unlimited)
    print_json(info) if as_json else print_text(moved(info))


def cancel_move(name: ClientName, state: State = None, as_json: AsJson = False) -> None:
    """End a move by an intermediate client where it began: the volume stays where it was, and is whole."""
    from farpage.cli.moving import cancel
    from farpage.cli.output import print_json, print_text
    from farpage.cli.wanted import named
    from farpage.cli.wording.move import moved

    info = cancel(state, named(name))
    print_json(info) if as_json else print_text(moved(info))


def add_to(app: typer.Typer) -> None:
    """Add these commands to those of `farpage client`."""
    app.command("move", epilog="Example: farpage client move web1 --to disk3 --bandwidth 200M")(move)
    app.command("move-status", epilog="Example: farpage client move-status web1")(move_status)
    app.command("pause-move", epilog="Example: farpage client pause-move web1")(pause_move)
    app.command("resume-move", epilog="Example: farpage client resume-move web1 --bandwidth 500M")(
        resume_move
    )
    app.command("cancel-move", epilog="Example: farpage client cancel-move web1")(cancel_move)
