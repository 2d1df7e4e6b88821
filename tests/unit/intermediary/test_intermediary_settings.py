"""Settings of an intermediate client that cannot be."""

from __future__ import annotations

import pytest

from farpage.cli.daemons import run_intermediary
from farpage.errors import InvalidInput

BOTH = ("one=unix:/nowhere/1", "two=unix:/nowhere/2")


@pytest.mark.parametrize(
    ("vioses", "listen", "field"),
    [
        (BOTH[:1], "unix:/nowhere/r", "vioses"),
        (("one=tcp:127.0.0.1:1", BOTH[1]), "unix:/nowhere/r", "--vios"),
        (("unix:/nowhere/1", BOTH[1]), "unix:/nowhere/r", "--vios"),
        (BOTH, "tcp:0.0.0.0:0", "listen"),
        (BOTH, "nowhere", "--listen"),
    ],
)
def test_what_is_wrong_is_named(vioses: tuple[str, ...], listen: str, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        run_intermediary(client="vm1", vioses=vioses, listen=listen, control=(), tls=None)
    assert caught.value.field.startswith(field)
