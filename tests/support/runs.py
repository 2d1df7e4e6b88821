"""The client's loops over runs, as machine code and as their twins."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest

from farpage.nbd import client, replies

FORMS = [
    pytest.param(
        "farpage.nbd._runs",
        id="compiled",
        marks=pytest.mark.skipif(find_spec("farpage.nbd._runs") is None, reason="not compiled"),
    ),
    pytest.param("farpage.nbd.runs", id="twin"),
]


def use_form(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """Have the client use those of one module, which is returned."""
    form = import_module(name)
    patch.setattr(client, "queue_runs", form.queue_runs)
    patch.setattr(client, "drop_sent", form.drop_sent)
    patch.setattr(replies, "take_replies", form.take_replies)
    return form
