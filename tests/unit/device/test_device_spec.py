from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.address import TcpAddress, UnixAddress
from farpage.device.spec import (
    Allocate,
    BlockSpec,
    CacheMode,
    DirectorySpec,
    MemorySpec,
    RemoteSpec,
    parse_size,
    parse_spec,
)
from farpage.errors import InvalidInput
from farpage.nbd.uri import NbdUri


def test_a_directory_may_have_a_size_and_a_cache_mode() -> None:
    assert parse_spec("dir:/srv/a?size=10G&cache=buffered") == DirectorySpec(
        "/srv/a", 10 << 30, CacheMode.BUFFERED
    )
    assert parse_spec("dir:/srv/a") == DirectorySpec("/srv/a", None, CacheMode.DIRECT)


def test_volumes_of_a_directory_are_sparse_or_allocated_in_full() -> None:
    assert parse_spec("dir:/srv/a?size=10G&allocate=full") == DirectorySpec(
        "/srv/a", 10 << 30, allocate=Allocate.FULL
    )
    assert parse_spec("dir:/srv/a?allocate=sparse") == parse_spec("dir:/srv/a")
    assert str(parse_spec("dir:/srv/a?allocate=sparse")) == "dir:/srv/a"


def test_memory_has_a_size() -> None:
    assert parse_spec("memory:64M") == MemorySpec(64 << 20)


def test_a_block_device_has_a_path() -> None:
    assert parse_spec("block:/dev/disk/by-id/a%3Fb") == BlockSpec("/dev/disk/by-id/a?b")
    assert str(BlockSpec("/dev/a?b")) == "block:/dev/a%3Fb"


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://host:9000/vm1", NbdUri(TcpAddress("host", 9000), "vm1")),
        ("nbd+unix:///vm1?socket=/run/s", NbdUri(UnixAddress("/run/s"), "vm1")),
    ],
)
def test_a_remote_export_is_an_nbd_uri(text: str, uri: NbdUri) -> None:
    assert parse_spec(text) == RemoteSpec(uri)
    assert str(parse_spec(text)) == text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4096", 4096), ("1k", 1024), ("512M", 512 << 20), ("10GiB", 10 << 30), ("2TB", 2 << 40), ("7B", 7)],
)
def test_sizes_have_binary_units(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5G", "G", "10 G", "99999999999P", "1e9", "٣"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("/srv/a", "device"),
        ("block:sda", "device.path"),
        ("block:/dev/sda?size=1G", "device.size"),
        ("nbds://host/", "device"),
        ("nbd://host:x/", "device.port"),
        ("nbd+unix:///a", "device.socket"),
        ("dir:", "device.path"),
        ("dir:relative", "device.path"),
        ("dir:/a%00b", "device.path"),
        ("dir:/a?size=big", "device.size"),
        ("dir:/a?cache=none", "device.cache"),
        ("dir:/a?allocate=thick", "device.allocate"),
        ("dir:/a?allocate=", "device.allocate"),
        ("dir:/a?colour=red", "device.colour"),
        ("memory:", "device.size"),
    ],
)
def test_a_wrong_specification_names_the_field_and_a_remedy(text: str, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_spec(text)
    assert caught.value.field == field
    assert caught.value.advice


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30),
    st.none() | st.integers(1, 1 << 50),
    st.sampled_from(CacheMode),
    st.sampled_from(Allocate),
)
def test_a_specification_survives_being_written(
    path: str, size_bytes: int | None, cache: CacheMode, allocate: Allocate
) -> None:
    spec = DirectorySpec("/" + path.strip("/"), size_bytes, cache, allocate)
    assert parse_spec(str(spec)) == spec


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        parse_spec(text)
