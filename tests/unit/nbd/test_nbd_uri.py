from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.address import TcpAddress, UnixAddress
from farpage.errors import InvalidInput
from farpage.nbd.uri import NbdUri, parse_uri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://host/vm1", NbdUri(TcpAddress("host", 10809), "vm1")),
        ("nbd://host", NbdUri(TcpAddress("host", 10809), "")),
        ("nbd://host:9000/", NbdUri(TcpAddress("host", 9000), "")),
        ("nbd://[::1]/x", NbdUri(TcpAddress("::1", 10809), "x")),
        ("nbd://[fe80::1]:5/a/b", NbdUri(TcpAddress("fe80::1", 5), "a/b")),
        ("nbd://host//a", NbdUri(TcpAddress("host", 10809), "/a")),
        ("nbd://host/a%20%23%3F", NbdUri(TcpAddress("host", 10809), "a #?")),
        ("nbd+unix:///?socket=/run/s", NbdUri(UnixAddress("/run/s"), "")),
        ("nbd+unix:///vm1?socket=/run/my%20s", NbdUri(UnixAddress("/run/my s"), "vm1")),
    ],
)
def test_the_forms_of_the_specification(text: str, uri: NbdUri) -> None:
    assert parse_uri(text) == uri


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("http://host/", "uri"),
        ("nbd:host", "uri"),
        ("nbds://host/", "uri"),
        ("nbds+unix:///?socket=/s", "uri"),
        ("nbd:///x", "uri.host"),
        ("nbd://::1/x", "uri.host"),
        ("nbd://[::1/x", "uri.host"),
        ("nbd://user@host/", "uri.host"),
        ("nbd://host:0/", "uri.port"),
        ("nbd://host:70000/", "uri.port"),
        ("nbd://host:ten/", "uri.port"),
        ("nbd://host/?socket=/s", "uri.socket"),
        ("nbd://host/?tls-certificates=/c", "uri.tls-certificates"),
        ("nbd+unix:///x", "uri.socket"),
        ("nbd+unix:///x?socket=relative", "uri.socket"),
        ("nbd+unix:///x?socket=/" + "a" * 108, "uri.socket"),
        ("nbd+unix://host/x?socket=/s", "uri.host"),
        ("nbd+unix:///?socket=/a&socket=/b", "uri.socket"),
        ("nbd://host/a#b", "uri"),
        ("nbd://host/a%00b", "uri.export"),
        ("nbd://host/%ff", "uri.export"),
        ("nbd://host/" + "a" * 5000, "uri.export"),
    ],
)
def test_anything_else_names_the_field_and_a_remedy(text: str, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_uri(text)
    assert caught.value.field == field
    assert caught.value.advice


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


@given(names, names)
def test_a_unix_uri_survives_being_written(export: str, path: str) -> None:
    uri = NbdUri(UnixAddress("/" + path[:20]), export)
    assert parse_uri(str(uri)) == uri


@given(names, st.sampled_from(["host", "10.0.0.1", "::1"]), st.integers(1, 65535))
def test_a_tcp_uri_survives_being_written(export: str, host: str, port: int) -> None:
    uri = NbdUri(TcpAddress(host, port), export)
    assert parse_uri(str(uri)) == uri


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        parse_uri(f"nbd://{text}")
