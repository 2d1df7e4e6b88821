"""Sizes, times and shares as people write them: `512M`, `1.5G`, `250ms`, `10%`."""

from __future__ import annotations

import re
from decimal import Decimal

from farpage.errors import InvalidInput

_SIZE = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*((?P<unit>[KMGT])(i?B)?|B)?", re.IGNORECASE)
_DURATION = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>ms|s|m|h)?")

_PERCENT = re.compile(r"(?P<number>[0-9]{1,3})\s*%?")

_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DURATION_UNITS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}

_LARGEST_BYTES = 1 << 63
_LONGEST_SECONDS = 366 * 24 * 3600


def parse_size(text: str, *, field: str = "size") -> int:
    """Return bytes for `4096`, `64K`, `512M`, `512MiB`, `1.5G` or `2T`; the units are powers of 1024.

    :raise InvalidInput: naming `field`, for anything else, for zero and for parts of a byte.
    """
    hint = "write a size like 512M, 1G or 65536"
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidInput(field, f"{text!r} is not a size", hint)
    size_bytes = Decimal(match["number"]) * _SIZE_UNITS[(match["unit"] or "").upper()]
    if size_bytes != int(size_bytes) or not 0 < size_bytes < _LARGEST_BYTES:
        raise InvalidInput(field, f"{text!r} is not a whole number of bytes from 1 to 2^63 - 1", hint)
    return int(size_bytes)


def parse_duration(text: str, *, field: str = "duration") -> float:
    """Return seconds for `1s`, `250ms`, `2m`, `1h` or a bare number of seconds.

    :raise InvalidInput: naming `field`, for anything else and for zero.
    """
    hint = "write a time like 1s, 250ms or 2m"
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise InvalidInput(field, f"{text!r} is not a time", hint)
    seconds = Decimal(match["number"]) * _DURATION_UNITS[match["unit"] or "s"]
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise InvalidInput(field, f"{text!r} is not between 0 and a year", hint)
    return float(seconds)


def parse_percent(text: str, *, field: str = "share", most: int = 100) -> int:
    """Return percent for `10%` or `10`.

    :raise InvalidInput: naming `field`, for anything else, for parts of a percent and for more than `most`.
    """
    match = _PERCENT.fullmatch(text.strip())
    percent = int(match["number"]) if match else most + 1
    if percent > most:
        raise InvalidInput(field, f"{text!r} is not from 0% to {most}%", "write whole percents like 10%")
    return percent


def format_size(size_bytes: int) -> str:
    """Return the size in the largest unit that keeps it at 1 or above, with at most one decimal."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _SIZE_UNITS[unit[0]]
        if abs(size_bytes) >= scale:
            whole, rest = divmod(size_bytes, scale)
            return f"{whole} {unit}" if rest == 0 else f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} B"


def format_duration(seconds: float) -> str:
    """Return the time with the unit that suits it: `850 us`, `12.5 ms`, `3.2 s`, `2m 05s`, `3h 20m`."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m"
