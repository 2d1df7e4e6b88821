"""httpx, imported in a way that takes a process less time to start.

httpx loads its command line if it can, and that rich, click and pygments, which takes longer than the rest of
it; where they are not installed it does without. Import httpx from here.
"""

from __future__ import annotations

import sys

_COMMAND_LINE = "httpx._main"

if _COMMAND_LINE in sys.modules:
    import httpx
else:
    sys.modules[_COMMAND_LINE] = None  # type: ignore[assignment] # importing it raises ImportError now
    try:
        import httpx
    finally:
        del sys.modules[_COMMAND_LINE]

__all__ = ["httpx"]
