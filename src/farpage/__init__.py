"""farpage pages the memory of virtual machines out to storage through redundant I/O servers.

region = farpage.Region(1 << 30, limit_bytes=256 << 20)
array = numpy.frombuffer(region, dtype=numpy.uint64)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farpage.attach.region import Region

__version__ = "0.1.0"
__all__ = ["Region", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported when it is used: every `farpage` command would pay for it otherwise.
    if name == "Region":
        from farpage.attach.region import Region

        return Region
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
