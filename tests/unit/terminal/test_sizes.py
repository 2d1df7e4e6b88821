from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.errors import ExitStatus, InvalidInput
from farpage.terminal.sizes import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4096B", 4096),
        ("64K", 64 << 10),
        ("512M", 512 << 20),
        ("512 MiB", 512 << 20),
        ("512mb", 512 << 20),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
    ],
)
def test_a_size_is_read_in_powers_of_1024(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "0", "0M", "-1", "1X", "M", "1.1", "0.3K", "1e3", "٣M", "9" * 30 + "T"])
def test_a_bad_size_names_the_field_and_a_good_one(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_size(text, field="--memory")
    assert caught.value.field == "--memory"
    assert "512M" in caught.value.advice
    assert caught.value.exit_status is ExitStatus.USAGE


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1", 1.0), ("1s", 1.0), ("250ms", 0.25), ("1.5s", 1.5), ("2m", 120.0), ("1h", 3600.0)],
)
def test_a_time_is_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0ms", "-1s", "1 day", "s", "nan", "inf", "999999999h"])
def test_a_bad_time_names_the_field(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_duration(text, field="--path-timeout")
    assert caught.value.field == "--path-timeout"


@given(st.integers(min_value=1, max_value=(1 << 63) - 1))
def test_whole_sizes_survive_being_shown_and_read(size_bytes: int) -> None:
    shown = format_size(size_bytes)
    assert parse_size(str(size_bytes)) == size_bytes
    if "." not in shown:
        assert parse_size(shown) == size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "shown"), [(0, "0 B"), (1023, "1023 B"), (128 << 20, "128 MiB"), (3 << 29, "1.5 GiB")]
)
def test_sizes_are_shown_in_the_unit_that_suits(size_bytes: int, shown: str) -> None:
    assert format_size(size_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.00085, "850 us"), (0.0125, "12.5 ms"), (3.21, "3.2 s"), (125, "2m 05s"), (12000, "3h 20m")],
)
def test_times_are_shown_in_the_unit_that_suits(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown
