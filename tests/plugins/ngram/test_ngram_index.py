"""The index against a brute-force search, and what a step costs."""

from __future__ import annotations

import random
from typing import Any

import pytest

from specplug_ngram import index as index_module
from specplug_ngram.index import NgramIndex

pytestmark = pytest.mark.unit


def brute_force(tokens: list[int], shortest: int, longest: int) -> tuple[int, int] | tuple[None, int]:
    for n in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) > n and tokens[end - n : end] == tokens[-n:]:
                return end, n
    return None, 0


def brute_force_continuation(tokens: list[int], start: int, count: int) -> list[int]:
    copied = list(tokens)
    for offset in range(count):
        copied.append(copied[start + offset])
    return copied[len(tokens) :]


@pytest.mark.parametrize("lengths", [(1, 1), (1, 4), (2, 5), (5, 5), (3, 12)])
@pytest.mark.parametrize("alphabet", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_finds_what_a_search_finds(lengths: tuple[int, int], alphabet: int, seed: int) -> None:
    choose = random.Random(seed)
    index = NgramIndex(*lengths)
    tokens: list[int] = []
    found = 0
    for _ in range(70):
        new = [choose.randrange(alphabet) for _ in range(choose.randint(0, 6))]
        if tokens and choose.random() < 0.3:  # long repeats, so that long n-grams match as well
            start = choose.randrange(len(tokens))
            new = tokens[start : start + 15]
        index.extend(new)
        tokens += new
        end, length = brute_force(tokens, *lengths)
        assert index.find() == end
        if end is not None:
            found += length == lengths[1]
            assert index.continuation(end, 9) == brute_force_continuation(tokens, end, 9)
    assert index.tokens == tokens
    assert found > 5


def test_a_collision_of_hashes_makes_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "hash", lambda key: hash(key) % 307, raising=False)
    choose = random.Random(0)
    index = NgramIndex(2, 4)
    hidden = found = 0
    for _ in range(500):
        index.extend([choose.randrange(8)])
        end = index.find()
        if end is None:
            hidden += brute_force(index.tokens, 2, 4)[0] is not None
        else:
            found += 1
            assert index.tokens[end - 2 : end] == index.tokens[-2:]
    assert found > 20
    assert hidden > 20


@pytest.mark.parametrize("context", [500, 20_000])
@pytest.mark.parametrize("alphabet", [2, 500])
def test_the_work_of_a_step_does_not_grow_with_the_context(
    context: int, alphabet: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = random.Random(0)
    index = NgramIndex(1, 6)
    index.extend([choose.randrange(alphabet) for _ in range(context)])
    calls = 0

    def counting(key: Any) -> int:
        nonlocal calls
        calls += 1
        return hash(key)

    monkeypatch.setattr(index_module, "hash", counting, raising=False)
    for _ in range(20):
        index.extend([choose.randrange(alphabet) for _ in range(4)])
        index.find()
    assert 20 <= calls <= 20 * (4 * 2 * 6 + 6)


def test_wide_ranges_stay_small_on_text_that_does_not_repeat_itself() -> None:
    index = NgramIndex(1, 100)
    index.extend(range(1000))
    assert len(index._last_end) < 1100


def test_the_copy_goes_on_through_itself() -> None:
    index = NgramIndex(1, 3)
    index.extend([9, 1, 2, 3, 1, 2, 3])
    assert index.find() == 4
    assert index.continuation(4, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert index.continuation(4, 2) == [1, 2]


@pytest.mark.parametrize("tokens", [[], [7], [7, 8]])
def test_nothing_is_found_in_next_to_nothing(tokens: list[int]) -> None:
    index = NgramIndex(1, 5)
    index.extend(tokens)
    assert index.find() is None
