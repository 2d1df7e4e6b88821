"""What the RAM tier keeps pages in: the same of the compiled store and of the one in Python."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.pager import store as stores
from farpage.pager.checksum import page_checksum
from farpage.pager.compression import MOST_BYTES, WORD_BYTES, pack
from farpage.pager.store import FAILURES, MOST_HELD, PythonStore, Store, new_store
from farpage.pager.table import PAGE_BYTES

MakeStore: TypeAlias = Callable[[int], Store]


def compiled(most_bytes: int) -> Store:
    store = new_store(most_bytes)
    if isinstance(store, PythonStore):
        pytest.skip("it was not compiled here")
    return store


@pytest.fixture(params=[PythonStore, compiled])
def make(request: pytest.FixtureRequest) -> MakeStore:
    found: MakeStore = request.param
    return found


def random_page(seed: int, random_bytes: int) -> bytes:
    return random.Random(seed).randbytes(random_bytes) + bytes(PAGE_BYTES - random_bytes)


def word_page(word: int) -> bytes:
    return word.to_bytes(WORD_BYTES, "little") * (PAGE_BYTES // WORD_BYTES)


def half(seed: int) -> bytes:
    return random_page(seed, PAGE_BYTES // 2)


def checksum_of(content: bytes) -> int:
    return page_checksum(memoryview(content))


@pytest.mark.parametrize(
    "content", [half(1), bytes(PAGE_BYTES), word_page(0xFACE), word_page(1)[:-1] + b"x", bytes(4095) + b"x"]
)
def test_a_page_is_given_as_it_was_kept_and_once(make: MakeStore, content: bytes) -> None:
    store = make(1 << 20)
    assert store.keep(7, memoryview(content)) == 1
    assert 7 in store
    assert store.look(7, checksum_of(content)) == content
    assert store.take(7, checksum_of(content)) == content
    assert 7 not in store
    assert store.take(7, checksum_of(content)) is None
    assert (store.kept, store.given, store.stored_bytes, store.taken_bytes) == (1, 1, 0, 0)


@pytest.mark.parametrize("random_bytes", range(MOST_BYTES - 64, MOST_BYTES, 4))
def test_what_gets_below_three_quarters_is_kept(make: MakeStore, random_bytes: int) -> None:
    content = random_page(random_bytes, random_bytes)
    packed = pack(memoryview(content))
    store = make(1 << 20)
    assert store.keep(0, memoryview(content)) == (packed is not None)
    assert store.stored_bytes == len(packed or b"")


def test_a_page_that_repeats_a_word_is_kept_as_that_word(make: MakeStore) -> None:
    store = make(1 << 20)
    store.keep(0, memoryview(word_page(0xFACE)))
    assert store.stored_bytes == WORD_BYTES


def test_a_page_with_another_checksum_is_not_given_and_dropped_when_taken(make: MakeStore) -> None:
    store = make(1 << 20)
    store.keep(7, memoryview(half(1)))
    assert store.look(7, checksum_of(half(2))) is None
    assert 7 in store
    assert store.take(7, checksum_of(half(2))) is None
    assert 7 not in store
    assert store.given == 0


def test_an_older_content_is_never_left(make: MakeStore) -> None:
    store = make(1 << 20)
    store.keep(3, memoryview(half(1)))
    store.keep(3, memoryview(half(2)))
    assert len(store) == 1
    assert store.look(3, checksum_of(half(2))) == half(2)
    store.keep(3, memoryview(random_page(3, PAGE_BYTES)))
    assert 3 not in store


def test_the_oldest_entry_makes_room(make: MakeStore) -> None:
    store = make(8 * PAGE_BYTES)
    page = 0
    while not store.dropped:
        store.keep(page, memoryview(half(page)))
        page += 1
    assert 0 not in store
    assert len(store) == page - 1
    store.take(1, checksum_of(half(1)))
    store.keep(page, memoryview(half(page)))
    assert 2 in store
    store.resize(3 * PAGE_BYTES)
    assert page in store
    assert 2 not in store
    assert store.taken_bytes <= 3 * PAGE_BYTES
    store.resize(0)
    assert len(store) == store.taken_bytes == store.stored_bytes == 0


def test_a_run_is_given_up_once_its_pages_do_not_compress(make: MakeStore) -> None:
    store = make(1 << 20)
    noise = [random_page(seed, PAGE_BYTES) for seed in range(FAILURES)]
    assert store.keep(0, memoryview(b"".join([half(1), *noise, half(2)]))) == 1
    assert FAILURES + 1 not in store
    assert store.failures == FAILURES
    assert store.keep(50, memoryview(half(1))) == 1
    assert store.failures == 0


def test_what_an_entry_takes_is_counted(make: MakeStore) -> None:
    store = make(1 << 30)
    for page in range(1000):
        store.keep(page, memoryview(random_page(page, 100 + page)))
    entry_bytes = (store.taken_bytes - store.stored_bytes) / len(store)
    expected = PythonStore.ENTRY_BYTES if isinstance(store, PythonStore) else stores.ENTRY_BYTES
    assert entry_bytes == pytest.approx(expected, rel=0.25)


def test_a_range_is_forgotten(make: MakeStore) -> None:
    store = make(1 << 20)
    store.keep(0, memoryview(b"".join(half(page) for page in range(6))))
    store.forget(1, 3)
    store.forget(4)
    store.forget(100, 1000)
    assert [page in store for page in range(6)] == [True, False, False, False, False, True]
    store.clear()
    assert 0 not in store
    assert len(store) == store.taken_bytes == 0


@pytest.mark.parametrize("count", [1 << 40, (1 << 64) - 1])
def test_a_range_of_any_length_is_forgotten(make: MakeStore, count: int) -> None:
    store = make(1 << 20)
    store.keep(0, memoryview(b"".join(half(page) for page in range(6))))
    store.forget((1 << 64) - 1, 2)
    store.forget(3, count)
    assert [page in store for page in range(6)] == [True, True, True, False, False, False]


def test_a_part_of_a_page_is_none(make: MakeStore) -> None:
    store = make(1 << 20)
    assert store.keep(0, memoryview((half(0) + half(1))[:-1])) == 1
    assert (0 in store, 1 in store) == (True, False)
    assert store.keep(5, memoryview(b"")) == 0


@pytest.mark.parametrize("content", [half(1), word_page(0xFACE)])
def test_a_content_lies_at_any_address(make: MakeStore, content: bytes) -> None:
    store = make(1 << 20)
    assert store.keep(7, memoryview(b"..." + content)[3:]) == 1
    assert store.take(7, checksum_of(content)) == content


def test_a_page_is_held_as_it_is_whatever_there_is_room_for(make: MakeStore) -> None:
    store = make(0)
    content = random_page(1, PAGE_BYTES)
    store.hold(7, memoryview(content))
    assert (7 in store, len(store), store.held, store.taken_bytes) == (True, 0, 1, 0)
    assert store.look(7, checksum_of(content)) == content
    assert store.take(7, checksum_of(content)) == content
    assert (7 in store, store.held, store.given) == (False, 0, 0)
    assert store.take(7, checksum_of(content)) is None


def test_of_pages_that_are_held_as_they_are_the_oldest_makes_room(make: MakeStore) -> None:
    store = make(0)
    for page in range(MOST_HELD):
        store.hold(page, random_page(page, PAGE_BYTES))
    assert store.take(3, checksum_of(random_page(3, PAGE_BYTES)))
    for page in range(100, 103):
        store.hold(page, random_page(page, PAGE_BYTES))
    assert store.held == MOST_HELD
    left = [*range(2, 3), *range(4, MOST_HELD), 100, 101, 102]
    assert [page for page in range(200) if page in store] == left
    assert all(store.take(page, checksum_of(random_page(page, PAGE_BYTES))) for page in left)


def test_a_page_is_held_in_its_newest_content_alone(make: MakeStore) -> None:
    store = make(1 << 20)
    store.keep(7, memoryview(half(1)))
    store.hold(7, half(2))
    assert (len(store), store.held) == (0, 1)
    store.hold(7, half(3))
    assert store.look(7, checksum_of(half(2))) is None
    assert store.look(7, checksum_of(half(3))) == half(3)
    store.keep(7, memoryview(half(4)))
    assert (len(store), store.held) == (1, 0)
    assert store.take(7, checksum_of(half(4))) == half(4)


def test_a_page_that_is_held_with_another_checksum_is_not_given_and_dropped_when_taken(
    make: MakeStore,
) -> None:
    store = make(0)
    store.hold(7, half(1))
    assert store.look(7, 1) is None
    assert 7 in store
    assert store.take(7, 1) is None
    assert 7 not in store


@pytest.mark.parametrize("count", [3, 1 << 40, (1 << 64) - 1])
def test_pages_that_are_held_as_they_are_are_forgotten_with_the_others(make: MakeStore, count: int) -> None:
    store = make(1 << 20)
    for page in range(6):
        store.hold(page, half(page))
    store.forget((1 << 64) - 1, 2)
    store.forget(3, count)
    assert [page in store for page in range(6)] == [True] * 3 + [False] * 3
    store.clear()
    assert (0 in store, store.held) == (False, 0)


@pytest.mark.parametrize("length", [0, PAGE_BYTES - 1, 2 * PAGE_BYTES])
def test_a_whole_page_is_held_or_none(make: MakeStore, length: int) -> None:
    store = make(0)
    with pytest.raises(ValueError, match=f"a page of {length} bytes"):
        store.hold(7, bytes(length))
    assert store.held == 0


Step: TypeAlias = tuple[str, int, int]


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["keep", "take", "forget", "resize"]), st.integers(0, 1200), st.integers(1, 1200)
        ),
        max_size=60,
    )
)
def test_both_stores_hold_what_a_dictionary_would(steps: list[Step]) -> None:
    """As the hash table grows and shrinks."""
    for make in (PythonStore, new_store):
        store: Store = make(1 << 22)
        model: dict[int, int] = {}
        for number, (step, first, count) in enumerate(steps):
            pages = range(first, first + count)
            if step == "keep":
                words = [page << 8 | number + 1 for page in pages]
                assert store.keep(first, memoryview(b"".join(map(word_page, words)))) == count
                for page, word in zip(pages, words, strict=True):
                    model.pop(page, None)
                    model[page] = word
            elif step == "take":
                for page in pages:
                    word = model.pop(page, 0)
                    content = store.take(page, checksum_of(word_page(word)))
                    assert content == (word_page(word) if word else None)
            elif step == "forget":
                store.forget(first, count)
                for page in pages:
                    model.pop(page, None)
            else:
                store.resize(store.taken_bytes * count // 1200)
                store.resize(1 << 22)
                for page in list(model)[: len(model) - len(store)]:
                    del model[page]
            assert len(store) == len(model)
            assert store.stored_bytes == len(model) * WORD_BYTES
        assert all(store.look(page, checksum_of(word_page(word))) for page, word in model.items())
        store.clear()
        assert store.taken_bytes == 0


def test_without_the_functions_that_the_compiled_store_calls_there_is_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stores, "COMPILED", None)
    assert isinstance(new_store(1), PythonStore)


def test_a_compiled_store_has_functions_to_call() -> None:
    store = type(compiled(1 << 20))
    with pytest.raises(ValueError, match="without functions"):
        store(1 << 20, 0, 0, 0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        store.__new__(store)
