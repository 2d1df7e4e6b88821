from __future__ import annotations

import pytest

from farpage.api.errors import error_body, name_of_field
from farpage.api.model import ErrorAnswer
from farpage.api.remote import EXIT_STATUS, HTTP_STATUS, RemoteError, remote_error
from farpage.definition.errors import RevisionConflict
from farpage.errors import ExitStatus, InvalidInput


def test_every_exit_status_has_an_http_status_and_comes_back() -> None:
    for status in set(ExitStatus) - {ExitStatus.OK}:
        assert EXIT_STATUS[HTTP_STATUS[status]] is status


def test_an_error_survives_the_wire() -> None:
    original = RevisionConflict(3, 5)
    answer = ErrorAnswer(error=error_body(original))
    arrived = remote_error(409, answer.model_dump_json().encode())
    assert (arrived.code, arrived.cause, arrived.advice) == (original.code, original.cause, original.advice)
    assert arrived.exit_status is ExitStatus.CONFLICT
    assert arrived.details == {"expected_revision": 3, "current_revision": 5}
    assert str(arrived) == str(original)


def test_braces_in_a_message_are_left_alone() -> None:
    arrived = remote_error(
        422, ErrorAnswer(error=error_body(InvalidInput("f", "{x}", "{0}"))).model_dump_json().encode()
    )
    assert str(arrived) == "f: {x}; {0}"


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"error":{}}'])
def test_an_answer_of_a_stranger_is_told_apart(body: bytes) -> None:
    arrived = remote_error(502, body)
    assert isinstance(arrived, RemoteError)
    assert arrived.code == "unexpected_answer"
    assert arrived.exit_status is ExitStatus.UNREACHABLE


@pytest.mark.parametrize(
    ("location", "name"),
    [
        (("body", "size_bytes"), "size_bytes"),
        (("body", "clients", "vm1", "volumes", 0, "name"), "clients.vm1.volumes[0].name"),
        (("query", "epoch"), "epoch"),
        (("body",), "body"),
        ((), "request"),
    ],
)
def test_a_wrong_field_is_named_as_it_is_written(location: tuple[int | str, ...], name: str) -> None:
    assert name_of_field(location) == name
