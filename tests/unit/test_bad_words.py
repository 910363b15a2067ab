"""Bad words as token sequences: what is banned is the word, with its white space, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specplug import SamplingParams
from specplug.errors import RequestError
from specplug.sampling.rules import LogitsRules
from specplug.text.bad_words import bad_word_ids
from support.vocabularies import KINDS, byte_level, metaspace, sentencepiece, word_piece


@pytest.fixture(params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def is_banned(tokenizer: Any, word: str, text: str) -> bool:
    """Whether a text cannot be written, one token after the other, behind its first token."""
    params = SamplingParams(bad_words=word)
    rules = LogitsRules(params, len(tokenizer), frozenset(), bad_word_ids([word], tokenizer), torch.device("cpu"))
    tokens = ids(tokenizer, text)
    logits = torch.zeros(1, len(tokenizer))
    return any(
        bool(rules.apply(logits, tokens[:place], 1, [[]])[0, token].isneginf()) for place, token in enumerate(tokens)
    )


WHITE_SPACE = ["\n", "\t", " \n", "\n\n", "  "]


@pytest.mark.parametrize("word", WHITE_SPACE)
def test_white_space_is_banned_as_it_is(tokenizer: Any, word: str) -> None:
    assert is_banned(tokenizer, word, f"x{word}")
    if word != "  ":  # there the second space belongs to the token of the word behind it
        assert is_banned(tokenizer, word, f"a cat{word}sat")
    assert not is_banned(tokenizer, word, "a cat sat on the mat. (x) y")
    if word != "\n":
        assert not is_banned(tokenizer, word, "a cat\nsat")


WORDS = ["cat", " cat", "the", "return", "x = y", "café", "你好", "\n    return", "  the"]


@pytest.mark.parametrize("word", WORDS)
def test_words_are_banned_inside_a_text(tokenizer: Any, word: str) -> None:
    for before in ("a", "(", "x.", "a\n"):
        if before == "a" and word[0].isalnum():
            continue  # they are one word
        text = f"{before}{word}"
        if ids(tokenizer, text)[: len(ids(tokenizer, before))] == ids(tokenizer, before):
            assert is_banned(tokenizer, word, text), text
    if not word[0].isspace():
        assert is_banned(tokenizer, word, f"so {word}")
        assert is_banned(tokenizer, word, word)
    assert not is_banned(tokenizer, word, "a dog sat on it\nand  so did (you)")


def test_a_word_that_begins_with_a_space_needs_that_space(tokenizer: Any) -> None:
    assert is_banned(tokenizer, " the", "so the")
    assert not is_banned(tokenizer, " the", "(the")
    assert is_banned(tokenizer, "the", "(the")


def test_a_prefix_space_of_the_tokenizer_is_not_taken_for_the_word() -> None:
    prefixed = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)

    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for tokenizer in (prefixed, sentencepiece(), metaspace()):
        space = ids(tokenizer, "x x")
        assert is_banned(tokenizer, "the", "(the")
        assert not is_banned(tokenizer, "\n", "x the x")
        assert [token for token in bad_word_ids(["\n"], tokenizer) if token == space[1:2]] == []


def test_tokenizers_that_lose_text() -> None:
    """Lower case is how such a tokenizer writes the word; white space at its end, or an unknown character, is not there."""
    bert = word_piece()
    assert is_banned(bert, "Cat", "a cat")
    assert is_banned(bert, " cat", "a cat")
    assert is_banned(bert, "foo(bar", "foo ( bar")
    assert not is_banned(bert, "你", "猫 x")  # both are unknown
    for word in ("\n", " ", "cat\n", "cat "):
        with pytest.raises(RequestError, match=r"bad_words: .* drops its white space"):
            bad_word_ids(["a", word], bert)


def test_what_a_word_is_encoded_behind_must_itself_be_known() -> None:
    """A vocabulary of words alone reads `.w1.` as its unknown token, which must not swallow the beginning of the word."""
    words = Tokenizer(models.WordLevel({f"w{token}.": token for token in range(9)}, unk_token="w0."))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    assert bad_word_ids(["w1. w2."], PreTrainedTokenizerFast(tokenizer_object=words)) == [[1, 2]]
