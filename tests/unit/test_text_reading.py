"""Outputs read as the continuation of their prompts, with every kind of tokenizer; long runs without text stay cheap."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from specplug import LLM, SamplingParams
from specplug.text.stream import TextStream
from support.models import save_model
from support.vocabularies import KINDS, byte_level, give, sentencepiece

TEXTS = ["a cat sat", " two  spaces and\n\ta tab", "def f(x):\n    return x", "naïve 你好 🎉 café", "x", " x"]


class Python:
    """The same tokenizer as one that is written in Python shows itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._inner = tokenizer.backend_tokenizer
        self.num_decoded = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._inner.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        self.num_decoded += len(ids)
        return str(self._inner.decode(ids, skip_special_tokens=skip_special_tokens))


def read(tokenizer: Any, prompt: list[int], output: list[int], **options: Any) -> str:
    stream = TextStream(tokenizer, prompt_ids=prompt, **options)
    for token in output:
        stream.push(token)
    return stream.text


@pytest.fixture(params=[(kind, form) for kind in KINDS for form in ("fast", "slow")], ids=lambda each: " ".join(each))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    kind, form = request.param
    return KINDS[kind]() if form == "fast" else Python(KINDS[kind]())


@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_output_are_the_text_of_the_whole(tokenizer: Any, text: str) -> None:
    """Wherever the ids are cut, also inside a character, whose text then belongs to the output."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    assert decode(ids) == text.removeprefix(" " if decode(ids) != text else "")
    for cut in range(1, len(ids)):
        before = decode(ids[:cut]).rstrip("�")
        assert before + read(tokenizer, ids[:cut], ids[cut:]) == decode(ids)


def test_broken_bytes_of_a_prompt_are_not_part_of_the_output(tokenizer: Any) -> None:
    x, cat = (tokenizer("x" + tail, add_special_tokens=False)["input_ids"] for tail in ("", " cat"))
    euro = _bytes(tokenizer, "€")
    for broken in (euro[:1], euro[:2], [*euro, euro[1]]):
        output = [*cat[len(x) :], *x[-1:]]
        assert read(tokenizer, [*x, *broken], output).startswith(" cat")
    assert read(tokenizer, [*x, *euro[:1]], euro[1:]) == "€"


def _bytes(tokenizer: Any, char: str) -> list[int]:
    """The ids of a character's bytes, where the vocabulary does not hold it as one token."""
    x, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("x", "x" + char))
    assert len(both) == len(x) + 3
    return list(both[len(x) :])


def test_special_tokens_before_an_output_leave_it_its_space() -> None:
    llama = sentencepiece()
    cat = llama(" cat", add_special_tokens=False)["input_ids"][1:]
    x = llama("x", add_special_tokens=False)["input_ids"]
    assert llama.decode([*x, *cat], skip_special_tokens=True) == "x cat"
    for specials in (1, 9, 90):
        assert read(llama, [*x, *[1] * specials], cat) == " cat"
        assert read(llama, [1] * specials, cat) == "cat"  # nothing before it leaves text
        assert read(llama, [*x, *[1] * specials], cat, skip_special_tokens=False).endswith("cat")


def test_text_that_must_be_read_anew_keeps_its_spaces() -> None:
    """A stray byte changes how the bytes before it read: what follows is read as the middle of a text."""
    llama = sentencepiece()
    x = llama("x", add_special_tokens=False)["input_ids"]
    cat = llama("x cat", add_special_tokens=False)["input_ids"][len(x) :]
    a, stray = llama.convert_tokens_to_ids(["<0x61>", "<0xE4>"])
    for subject in (llama, Python(llama)):
        assert read(subject, x, [a, stray, *cat, *cat]) == "a� cat cat"


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_never_take_anything_back(tokenizer: Any, seed: int) -> None:
    choose = random.Random(seed)
    pieces = [_bytes(tokenizer, char) for char in "€你"]
    x = tokenizer("x x", add_special_tokens=False)["input_ids"]
    ids = [token for _ in range(60) for token in choose.choice([choose.choice(pieces)[: choose.randint(1, 3)], x[-1:]])]
    stream = TextStream(tokenizer, prompt_ids=ids[:20])
    released = ""
    for token in ids[20:]:
        stream.push(token)
        released += stream.take(1)[0]
        assert released == stream.text
    assert stream.text.count("x") == sum(token == x[-1] for token in ids[20:])


def test_stop_strings_match_in_the_output_alone() -> None:
    llama = sentencepiece()
    prompt = llama("a cat", add_special_tokens=False)["input_ids"]
    output = llama("a cat cat cat", add_special_tokens=False)["input_ids"][len(prompt) :]
    for stop, text in ((" cat", ""), ("cat c", " "), ("t cat", " ca"), ("a cat cat", None)):
        stream = TextStream(llama, [stop], prompt_ids=prompt)
        ended = next((True for token in output if stream.push(token)), False)
        assert (stream.text, stream.stop_string) == ((" cat cat", None) if text is None else (text, stop))
        assert ended == (text is not None)


@pytest.mark.parametrize("kind", ["special", "broken", "incomplete", "joint"])
@pytest.mark.parametrize("form", ["fast", "slow"])
def test_runs_without_text_cost_no_more_per_token(kind: str, form: str) -> None:
    """Ids that are decoded, counted, and time with a generous limit: 20,000 took 52 s when it was quadratic."""
    fast = sentencepiece() if kind in ("special", "joint") else byte_level()
    tokenizer = fast if form == "fast" else Python(fast)
    x = fast("x", add_special_tokens=False)["input_ids"]
    euro = _bytes(fast, "€")
    run = {"special": [0], "broken": euro[1:2], "incomplete": euro[:2], "joint": [euro[1], euro[0]]}[kind]
    count = 20_000 // len(run)
    start = time.perf_counter()
    text = read(tokenizer, x, [*run * count, *x])
    seconds = time.perf_counter() - start
    assert seconds < 10
    if isinstance(tokenizer, Python):
        assert tokenizer.num_decoded < 60 * 20_000
    expected = tokenizer.decode([*x, *run * count, *x], skip_special_tokens=True)
    assert "x" + text == expected


# ---- through the engine -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    tokenizer = sentencepiece()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = save_model(tmp_path_factory.mktemp("model"), "llama", vocab_size=len(tokenizer), tie_word_embeddings=False)
    with LLM(give(folder, tokenizer), memory="64MiB", dtype="float32", check_parity=False) as llm:
        yield llm


@pytest.mark.engine
def test_an_output_of_the_engine_begins_with_its_space(llama: LLM) -> None:
    tokenizer = llama.get_tokenizer()
    the = tokenizer("x the", add_special_tokens=False)["input_ids"][-1]
    assert tokenizer.convert_ids_to_tokens(the) == "▁the"
    params = SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[the], logprobs=1, prompt_logprobs=1)
    for output in (llama.generate("def x", params)[0], llama.chat([{"role": "user", "content": "def x"}], params)[0]):
        completion = output.outputs[0]
        assert completion.text == " the the the"
        assert [position[the].decoded_token for position in completion.logprobs or ()] == [" the"] * 3
        scored = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
        assert "def x".endswith("".join(position[token].decoded_token for token, position in scored if position))
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "this is"}]
    reply = llama.chat(messages, params, add_generation_prompt=False, continue_final_message=True)[0]
    assert (reply.prompt, reply.outputs[0].text) == ("xthis is", " the the the")


def test_a_stop_string_with_a_space_is_found_at_once(llama: LLM) -> None:
    the = llama.get_tokenizer()("x the", add_special_tokens=False)["input_ids"][-1]
    params = SamplingParams(temperature=0, max_tokens=9, allowed_token_ids=[the], stop=" the")
    completion = llama.generate("def x", params)[0].outputs[0]
    assert (completion.text, len(completion.token_ids), completion.stop_reason) == ("", 1, " the")
    pieces = list(llama.stream("the", SamplingParams(temperature=0, max_tokens=2, allowed_token_ids=[the])))
    assert "".join(piece.text for piece in pieces) == " the the"
