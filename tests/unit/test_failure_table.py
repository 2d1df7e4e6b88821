"""Each row of the failure table in docs/operations.md names a test that proves it, and that test exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = "## Failure table"
FUNCTION = re.compile(r"`(test_\w+)`")
FILE = re.compile(r"`(tests/[\w/.]+)`")


def rows() -> list[str]:
    text = (ROOT / "docs" / "operations.md").read_text().partition(TABLE)[2].partition("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| ")][2:]


def test_every_row_of_the_failure_table_names_a_test() -> None:
    assert len(rows()) > 30
    assert [row for row in rows() if not FUNCTION.search(row) and not FILE.search(row)] == []


def test_every_test_that_the_documentation_names_exists() -> None:
    known = set[str]()
    for path in (ROOT / "tests").rglob("test_*.py"):
        known |= set(re.findall(r"def (test_\w+)", path.read_text()))
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text()
        assert set(FUNCTION.findall(text)) <= known, page
        assert [name for name in FILE.findall(text) if not (ROOT / name).exists()] == [], page
