"""What every step of the claim has at hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.claims.table import EVIDENCE

Evidence = Callable[[str], None]


@pytest.fixture
def evidence(record_property: Callable[[str, object], None]) -> Evidence:
    """Note what shows the clause, in one line."""

    def note(text: str) -> None:
        record_property(EVIDENCE, text)

    return note
