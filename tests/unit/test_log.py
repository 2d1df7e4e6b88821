"""Lines of the log."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from farpage import log as log_module
from farpage.log import Line, configure_logging, diverted, get_logger

log = get_logger()


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon's log; the test's own handlers and fields come back after it."""
    root = logging.getLogger()
    monkeypatch.setattr(log_module, "_fields", {})
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)
    configure_logging(vios="vios1")


@pytest.mark.usefixtures("configured")
def test_a_line_is_one_json_object_with_the_daemons_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("volume_opened", volume="vm1", folder=Path("/srv"), text="two\nlines")
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert found.pop("timestamp").endswith("Z")
    assert found == {
        "event": "volume_opened",
        "level": "info",
        "vios": "vios1",
        "volume": "vm1",
        "folder": "/srv",
        "text": "two\nlines",
    }


def test_an_exception_comes_with_its_traceback() -> None:
    lines: list[Line] = []
    with diverted(lines.append):
        try:
            raise ValueError("odd")
        except ValueError as problem:
            log.exception("unexpected")
            log.error("again", exc_info=problem)
        log.error("without")
    assert [line["level"] for line in lines] == ["error"] * 3
    assert ["test_an_exception_comes" in line.get("exception", "") for line in lines] == [True, True, False]
    assert "ValueError: odd" in lines[0]["exception"]


@pytest.mark.usefixtures("configured")
def test_what_libraries_log_is_a_line_too_but_not_their_chatter() -> None:
    lines: list[Line] = []
    with diverted(lines.append):
        logging.getLogger("asyncio").error("a %s was lost", "task")
        logging.getLogger("uvicorn.error").info("started")
    (line,) = lines
    assert (line["event"], line["level"], line["logger"]) == ("a task was lost", "error", "asyncio")
