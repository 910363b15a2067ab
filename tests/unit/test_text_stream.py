"""Text that grows token by token: whole characters, stop strings across tokens, and nothing that is taken back."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

import specplug.tiny
from specplug import LLM, SamplingParams
from specplug.text.stream import TextStream
from support.follow import Follow
from support.speculators import provide

TEXTS = [
    "def f(x):\n    return x  # naïve café",
    "你好、世界。日本語のテキスト。",
    "🎉👩‍👩‍👧 ok 🇩🇪🏳️‍🌈 end",
    "a\n\n\tb   c — “quoted” … ½ ∑",
    "abcabcababcabc abab",
    "ж" * 5 + "ne\u0301é" * 4,
]
PIECES = [
    "a",
    "ab",
    "abc",
    "bca",
    "b",
    "。",
    "世界",
    "🇩🇪",
    "né",
    "ne\u0301",
    " ok",
    "\n",
    "x",
    "return x",
    "zzz",
    "жжж",
]


@cache
def fast() -> Any:
    return AutoTokenizer.from_pretrained(Path(specplug.tiny.__file__).parent)


@cache
def _byte_of() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


@cache
def _vocabulary() -> dict[bytes, int]:
    return {
        bytes(_byte_of()[char] for char in token): number
        for token, number in fast().get_vocab().items()
        if number not in fast().all_special_ids
    }


class Slow:
    """A tokenizer written in Python, over the same ids."""

    def __init__(self) -> None:
        self.bytes_of = {number: content for content, number in _vocabulary().items()}
        self.calls = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        self.calls += 1
        parts = [self.bytes_of.get(number, b"" if skip_special_tokens else b"<s>") for number in ids]
        return b"".join(parts).decode("utf-8", errors="replace")


def split(text: str, choose: random.Random) -> list[int]:
    """A random way to write the text with the vocabulary."""
    content, ids = text.encode(), []
    while content:
        sizes = [size for size in range(1, 9) if content[:size] in _vocabulary() and size <= len(content)]
        size = choose.choice(sizes)
        ids.append(_vocabulary()[content[:size]])
        content = content[size:]
    return ids


def whole(tokenizer: Any, ids: list[int]) -> str:
    """All characters that are complete."""
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("�")


@pytest.fixture(params=["fast", "slow"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return fast() if request.param == "fast" else Slow()


@pytest.mark.parametrize("text", TEXTS)
def test_characters_come_whole(tokenizer: Any, text: str) -> None:
    for seed in range(5):
        ids = split(text, random.Random(seed))
        stream = TextStream(tokenizer)
        pieces = []
        for place, token in enumerate(ids, start=1):
            assert not stream.push(token)
            pieces += stream.take(1)
            assert "".join(pieces) == stream.text == whole(tokenizer, ids[:place])
            assert "�" not in pieces[-1]
        assert "".join(pieces) == text


def _end(texts: list[str], stop: list[str], least: int) -> tuple[int, str, str] | None:
    """(tokens, place, stop string) of the end, by looking at whole texts: texts[i] is that of the first i tokens."""
    for count in range(1, len(texts)):
        hits = []
        for each in stop:
            place = texts[count].find(each)
            while place >= 0 and place + len(each) <= len(texts[count - 1]):
                place = texts[count].find(each, place + 1)
            if place >= 0:
                hits.append((place, -len(each), each))
        if hits and count >= least:
            place, _, each = min(hits)
            return count, place, each
    return None


@pytest.mark.parametrize("seed", range(150))
def test_any_split_any_stop_any_run(tokenizer: Any, seed: int) -> None:
    """Tokens arrive in runs, as a step commits them; what is released is always the beginning of the final text."""
    choose = random.Random(seed)
    text = "".join(choose.choice([*TEXTS, *PIECES]) for _ in range(choose.randint(1, 4)))
    ids = split(text, choose)
    stop = [choose.choice(PIECES) for _ in range(choose.randint(0, 3))]
    if choose.random() < 0.5:
        start = choose.randrange(len(text))
        stop.append(text[start : start + choose.randint(1, 9)])
    include, least = choose.random() < 0.5, choose.choice([0, 0, len(ids) // 2])
    texts = [whole(tokenizer, ids[:count]) for count in range(len(ids) + 1)]
    end = _end(texts, stop, least)
    final = text if end is None else texts[end[0]][: end[1] + len(end[2]) * include]
    longest = max(map(len, stop), default=1)

    stream = TextStream(tokenizer, stop, include_stop=include)
    released, count = "", 0
    ended = False
    while count < len(ids) and not ended:
        run = []
        for token in ids[count : count + choose.randint(1, 6)]:
            count += 1
            run.append(min(len(texts[count]), len(final)))
            if ended := stream.push(token, may_stop=count >= least):
                break
        if ended or count == len(ids):
            stream.finish()
        before = len(released)
        pieces = stream.take(len(run))
        assert len(pieces) == len(run)
        released += "".join(pieces)
        assert final.startswith(released)
        assert "�" not in released
        assert len(released) >= run[-1] - (longest - 1), "more was held back than could become a stop string"
        for place, size in enumerate(run):  # each token has the text that it completes, as far as it is released
            assert before + len("".join(pieces[: place + 1])) == min(max(size, before), len(released))
    assert ended == (end is not None)
    assert count == (len(ids) if end is None else end[0])
    assert released == stream.text == final
    assert stream.stop_string == (None if end is None else end[2])


def feed(text: str, sizes: list[int], stop: list[str], **options: Any) -> tuple[TextStream, list[str]]:
    """Pushes the characters of ASCII text in tokens of these sizes; returns the stream and what it gave."""
    stream = TextStream(Slow(), stop, **options)
    pieces = []
    for size in sizes:
        token, text = _vocabulary()[text[:size].encode()], text[size:]
        if ended := stream.push(token):
            stream.finish()
        pieces += stream.take(1)
        if ended:
            break
    return stream, pieces


def test_the_earliest_stop_string_wins_and_the_longest_of_those() -> None:
    cases = [
        ("import", [6], ["port", "mp"], "mp", "i"),
        ("import", [6], ["im", "import", "imp"], "import", ""),
        ("import", [1] * 6, ["im", "import", "imp"], "im", ""),
        ("import", [1] * 6, ["port", "ort", "rt"], "port", "im"),
        ("import", [1] * 6, ["mport", "or"], "or", "imp"),
        ("selfself", [4, 4], ["fs"], "fs", "sel"),
    ]
    for text, sizes, stop, winner, rest in cases:
        for order in (stop, stop[::-1]):
            for include in (False, True):
                stream, pieces = feed(text, sizes, order, include_stop=include)
                assert stream.stop_string == winner
                assert "".join(pieces) == stream.text == rest + winner * include


def test_a_stop_string_that_was_complete_too_early_ends_nothing_later() -> None:
    stream = TextStream(fast(), ["ab", "0123456789"])
    byte = {char: _vocabulary()[char.encode()] for char in "abx"}
    assert [stream.push(byte[char], may_stop=place >= 2) for place, char in enumerate("abxxx")] == [False] * 5
    stream.push(byte["a"])
    assert stream.push(byte["b"])
    assert stream.text == "abxxx"


def test_a_last_token_without_text() -> None:
    """The end-of-sequence token is committed, but not decoded: the texts of the tokens before it stay theirs."""
    a, b, c = (_vocabulary()[char.encode()] for char in "abc")
    stream = TextStream(fast())
    stream.push(a)
    assert stream.take(1) == ["a"]
    for token in (b, c):
        stream.push(token)
    stream.finish()
    assert stream.take(3) == ["b", "c", ""]
    stream = TextStream(fast())
    stream.push(a)
    stream.push(b)
    stream.finish()
    assert stream.take(3) == ["a", "b", ""]
    assert TextStream(fast()).take(1) == [""]
    held = TextStream(fast(), ["abcd"])
    held.push(a)
    assert held.take(1) == [""]
    held.finish()
    assert held.take(1) == ["a"]


def test_special_tokens(tokenizer: Any) -> None:
    special = fast().eos_token_id
    a, b = (_vocabulary()[char.encode()] for char in "ab")
    shown = "<s>" if isinstance(tokenizer, Slow) else fast().eos_token
    for skip, expected in ((True, "ab"), (False, f"a{shown}b")):
        stream = TextStream(tokenizer, skip_special_tokens=skip)
        for token in (a, special, b):
            stream.push(token)
        assert stream.text == expected


def test_slow_tokenizers_decode_a_window() -> None:
    slow = Slow()
    stream = TextStream(slow)
    decoded: list[int] = []
    inner = slow.decode

    def decode(ids: list[int], skip_special_tokens: bool = False) -> str:
        decoded.append(len(ids))
        return inner(ids, skip_special_tokens)

    slow.decode = decode  # type: ignore[method-assign]
    ids = split(TEXTS[1] * 20, random.Random(0))
    for token in ids:
        stream.push(token)
    assert stream.text == TEXTS[1] * 20
    assert max(decoded) < 20


def test_bytes_that_undo_what_was_decoded() -> None:
    """With byte fallback, a stray byte turns the characters before it into �: released text stays, the rest follows."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hi": 256, "x": 257}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="x"))
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])

    class Wrapped:
        backend_tokenizer = backend

    stream = TextStream(Wrapped())
    for token in (256, 0x61, 0xE4, 257, 256, *"你".encode(), 256):
        stream.push(token)
    assert stream.text == "hia�x hi你 hi"


@pytest.mark.engine
def test_stop_strings_inside_accepted_runs() -> None:
    prompt = fast()("class Stack:\n    def __init__(self):\n")["input_ids"]
    choose = random.Random(3)
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    follow = Follow([])
    with LLM("tiny", memory="256MiB", dtype="float32", **provide(lambda c, t: follow, gamma=15)) as llm:
        base = llm.generate([prompt], plain)[0].outputs[0]
        follow.known.append(prompt + base.token_ids)
        starts = [choose.randrange(len(base.text) - 12) for _ in range(24)]
        stops = [base.text[start : start + choose.randint(1, 12)] for start in starts]
        params = [
            SamplingParams(
                temperature=0, max_tokens=40, ignore_eos=True, stop=[stop, "never"], include_stop_str_in_output=even
            )
            for stop in stops
            for even in (False, True)
        ]
        texts: dict[str, str] = {}
        for piece in llm.stream([prompt] * len(params), params):
            texts[piece.request_id] = texts.get(piece.request_id, "") + piece.text
        outputs = [output.outputs[0] for output in llm.generate([prompt] * len(params), params)]
    for param, output, streamed in zip(params, outputs, texts.values(), strict=True):
        stop = param.stop[0]
        kept = base.text.index(stop) + len(stop) * param.include_stop_str_in_output
        assert output.text == streamed == base.text[:kept]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        count = len(output.token_ids)
        assert output.token_ids == base.token_ids[:count]
        assert stop in fast().decode(output.token_ids)
        assert stop not in whole(fast(), output.token_ids[:-1])
    assert sum(output.metrics.num_accepted_draft_tokens for output in outputs) > len(outputs)
