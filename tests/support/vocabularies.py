"""Real tokenizers of the two kinds that checkpoints have, trained on the spot."""

from __future__ import annotations

import functools
import inspect
import json
import string
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@functools.cache
def corpus() -> list[str]:
    """A few hundred lines of English and Python."""
    return [line for module in (textwrap, string, inspect) for line in inspect.getsource(module).splitlines()][:2500]


@functools.cache
def _byte_level(size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer.to_str()


def byte_level(size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's: no unknown token, `Ġthe`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level(size)), eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


@functools.cache
def _sentencepiece(size: int, kind: str) -> str:
    special = ["<unk>", "<s>", "</s>"]
    trainer: Any
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    if kind == "bpe":
        pieces = sorted(model["vocab"], key=model["vocab"].get)
        model["vocab"] = {piece: i for i, piece in enumerate([*pieces[:3], *_BYTES, *pieces[3:]])}
    else:
        pieces = model["vocab"]
        model["vocab"] = [*pieces[:3], *([piece, -20.0] for piece in _BYTES), *pieces[3:]]
        model["byte_fallback"] = True
    return json.dumps(state)


def sentencepiece(size: int = 400, kind: str = "bpe") -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's: `▁the`, the 256 bytes as tokens of their own before the pieces, an unknown token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_sentencepiece(size, kind)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def word_piece() -> PreTrainedTokenizerFast:
    """A tokenizer as BERT's: lower case, words and `##` endings, white space and unknown characters lost."""
    pieces = ["[UNK]", "[CLS]", "[SEP]", "a", "cat", "sat", "##s", "##at", "c", "(", ")", "foo", "bar", "x", ".", "the"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def metaspace() -> PreTrainedTokenizerFast:
    """Llama's newer kind: the same pieces as `sentencepiece`, by a Metaspace pre-tokenizer and decoder."""
    tokenizer = Tokenizer.from_str(sentencepiece().backend_tokenizer.to_str())
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "unigram": lambda: sentencepiece(kind="unigram"),
}


def give(folder: Path, tokenizer: PreTrainedTokenizerFast, *added: str) -> Path:
    """Saves a tokenizer, with more special tokens behind its own, in a model's folder."""
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    tokenizer.save_pretrained(folder)
    return folder
