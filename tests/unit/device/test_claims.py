from __future__ import annotations

from pathlib import Path

import pytest

from farpage.device.base import EPOCH_MAX
from farpage.device.claim import Claim, Claims, new_owner
from farpage.device.label import Header

ANNA, BERT, CARL = "00000000000000aa", "ffffffffffffffbb", "00000000000000cc"


def after(*added: Claim) -> Claims:
    claims = Claims()
    for claim in added:
        claims.add(claim)
    return claims


def test_an_owner_may_come_again_and_raise_its_epoch() -> None:
    claims = after(Claim(5, ANNA))
    assert not claims.refuses(Claim(5, ANNA))
    assert claims.add(Claim(6, ANNA))
    assert claims.refuses(Claim(5, ANNA))
    assert not claims.of_another(Claim(5, ANNA))


def test_one_epoch_has_one_owner() -> None:
    claims = after(Claim(6, BERT))
    assert claims.refuses(Claim(6, ANNA))
    assert claims.refuses(Claim(6))
    assert claims.of_another(Claim(6, ANNA))
    assert claims.current == Claim(6, BERT)


def test_a_new_owner_comes_in_above_the_present_epoch() -> None:
    assert after(Claim(5, ANNA), Claim(6, BERT)).current == Claim(6, BERT)


def test_an_owner_that_was_replaced_stays_out_whatever_its_epoch() -> None:
    claims = after(Claim(5, ANNA), Claim(6, BERT))
    assert claims.refuses(Claim(900, ANNA))
    assert not claims.refuses(Claim(900, CARL))


def test_an_owner_from_before_the_present_one_stays_out_where_it_never_was() -> None:
    second, third = new_owner(3, "ffffffff"), new_owner(4, "00000000")
    claims = after(Claim(1, new_owner(1, "00000000")), Claim(4, third))
    assert claims.refuses(Claim(5, second))
    assert not claims.refuses(Claim(5, third))
    assert not claims.refuses(Claim(5, new_owner(5, "00000000")))


def test_tools_without_a_token_go_by_the_epoch_alone() -> None:
    claims = after(Claim(1), Claim(2))
    assert not claims.refuses(Claim(2))
    assert not claims.refuses(Claim(3))
    assert claims.refuses(Claim(1))
    assert after(Claim(1), Claim(2, ANNA), Claim(3)).refuses(Claim(4, ANNA))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Header.create(tmp_path / "vm1")
    return tmp_path / "vm1"


def test_a_header_tells_every_process_the_same_owner(path: Path) -> None:
    with Header(path) as one, Header(path) as other:
        assert one.current == other.current == Claim()
        assert one.claim(Claim(5, ANNA)) == Claim(5, ANNA)
        assert other.claim(Claim(5, BERT)) == Claim(5, ANNA)
        assert other.claim(Claim(6, BERT)) == Claim(6, BERT)
        assert one.claim(Claim(7, ANNA)) == Claim(6, BERT)
    with Header(path) as later:
        assert later.claim(Claim(8, ANNA)) == Claim(6, BERT)
        assert later.claim(Claim(EPOCH_MAX)) == Claim(EPOCH_MAX)


def test_of_two_owners_who_come_at_once_the_first_in_the_file_counts(path: Path) -> None:
    with Header(path) as one, Header(path) as other:
        record = _appended(path, Claim(5, BERT))
        one.claim(Claim(5, ANNA))
        _append(path, record)
        assert one.current == other.current == Claim(5, ANNA)


def test_a_header_from_before_owners_were_told_apart_is_read(path: Path) -> None:
    _append(path, (3).to_bytes(8, "little") + (9).to_bytes(8, "little"))
    with Header(path) as header:
        assert header.current == Claim(9)
        assert header.claim(Claim(10, ANNA)) == Claim(10, ANNA)


@pytest.mark.parametrize("written_bytes", [8, 16])
def test_a_record_that_a_full_device_cut_off_counts_as_none(path: Path, written_bytes: int) -> None:
    _append(path, _appended(path, Claim(7, ANNA))[:written_bytes])
    with Header(path) as header:
        assert header.current == Claim()
        assert header.claim(Claim(5, BERT)) == Claim(5, BERT)
        assert header.claim(Claim(6)) == Claim(6)
    with Header(path) as header:
        assert header.current == Claim(6)


def _appended(path: Path, claim: Claim) -> bytes:
    """Return the record of a claim without leaving it in the file."""
    before = path.read_bytes()
    twin = path.with_name("twin")
    twin.write_bytes(before)
    with Header(twin) as other:
        other.claim(claim)
    return twin.read_bytes()[len(before) :]


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)
