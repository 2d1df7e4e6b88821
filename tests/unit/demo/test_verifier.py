from __future__ import annotations

import numpy as np

from farpage.demo.region_guest import Verifier
from farpage.demo.stamps import WORDS_PER_PAGE

PAGES = 64


def test_a_memory_that_keeps_what_was_written_is_all_verified() -> None:
    verifier = Verifier(np.zeros(PAGES * WORDS_PER_PAGE, dtype=np.uint64), PAGES)
    filled = verifier.fill()
    assert filled is not None
    assert filled.pages == PAGES
    for _ in range(4):
        report = verifier.check()
        assert report is not None
        assert (report.pages_verified, report.pages_wrong) == (PAGES, 0)


def test_a_page_that_changed_is_wrong() -> None:
    words = np.zeros(PAGES * WORDS_PER_PAGE, dtype=np.uint64)
    verifier = Verifier(words, PAGES)
    verifier.fill()
    words[10 * WORDS_PER_PAGE + 511] ^= np.uint64(1)
    words[20 * WORDS_PER_PAGE : 21 * WORDS_PER_PAGE] = 0
    report = verifier.check()
    assert report is not None
    assert (report.pages_verified, report.pages_wrong) == (PAGES - 2, 2)


def test_an_old_copy_of_a_rewritten_page_is_wrong() -> None:
    words = np.zeros(PAGES * WORDS_PER_PAGE, dtype=np.uint64)
    verifier = Verifier(words, PAGES)
    verifier.fill()
    old = words.copy()
    first = verifier.check()
    assert first is not None
    assert first.pages_wrong == 0
    rewritten = int((old.reshape(PAGES, -1)[:, 0] != words.reshape(PAGES, -1)[:, 0]).sum())
    words[:] = old
    second = verifier.check()
    assert second is not None
    assert second.pages_wrong == rewritten > 0


def test_a_stopped_verifier_returns_without_a_report() -> None:
    verifier = Verifier(np.zeros(PAGES * WORDS_PER_PAGE, dtype=np.uint64), PAGES)
    verifier.stop()
    assert verifier.fill() is None
    assert verifier.check() is None
