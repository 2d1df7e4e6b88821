"""The pages in docs/commands say what the commands accept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from farpage.cli.main import COMMANDS, app

PAGES = Path(__file__).parents[3] / "docs" / "commands"


def commands() -> Iterator[tuple[str, str, object]]:
    """Yield page, command line and command for every command."""
    root = typer.main.get_command(app)
    for noun in COMMANDS:
        group = root.get_command(None, noun)  # type: ignore[attr-defined]
        if hasattr(group, "commands"):
            for verb, command in group.commands.items():
                yield noun, f"farpage {noun} {verb}", command
        else:
            yield noun, f"farpage {noun}", group


@pytest.mark.parametrize(("page", "line", "command"), list(commands()), ids=lambda value: str(value)[:30])
def test_every_command_and_option_is_on_its_page(page: str, line: str, command: object) -> None:
    text = (PAGES / f"{page}.md").read_text()
    assert line in text
    for parameter in command.params:  # type: ignore[attr-defined]
        for option in parameter.opts:
            assert not option.startswith("--") or option in text, f"{option} of '{line}'"


@pytest.mark.parametrize(("page", "line", "command"), list(commands()), ids=lambda value: str(value)[:30])
def test_every_command_has_a_summary_and_an_example(page: str, line: str, command: object) -> None:
    assert command.help  # type: ignore[attr-defined]
    assert line in command.epilog  # type: ignore[attr-defined]


def test_the_overview_names_every_command() -> None:
    overview = (PAGES / "README.md").read_text()
    for page, line, _ in commands():
        row = next(row for row in overview.splitlines() if f"({page}.md)" in row)
        assert line.split()[-1] in row.replace("\\|", " ").replace("`", " ").replace(":", " ").split(), line


def test_the_overview_links_every_page() -> None:
    overview = (PAGES / "README.md").read_text()
    assert {path.name for path in PAGES.glob("*.md")} - {"README.md"} == {
        f"{page}.md" for page, _, _ in commands() if f"({page}.md)" in overview
    }
