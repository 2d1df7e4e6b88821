"""`python -m tests.claims`: prove the claim, clause by clause, and print nothing but the table."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.claims.table import ClauseTable


def main() -> int:
    """Run the tests and return 0 when every clause is shown."""
    table = ClauseTable()
    file = str(Path(__file__).with_name("test_claims.py"))
    # Without the reporter of pytest its options are not known either.
    quiet = ["-p", "no:terminal", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
    pytest.main([file, *quiet, *sys.argv[1:]], plugins=[table])
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "140"))
    table.print(Console(width=width))
    return 0 if table.passed else 1


if __name__ == "__main__":
    sys.exit(main())
