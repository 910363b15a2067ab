"""Which tokens target and draft share is found out from real tokenizers, and output is exact whatever they share."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specplug import LLM, ConfigurationError, SamplingParams
from specplug_draft_model.vocabulary import VocabularyMap, match_vocabularies
from support.drafting import recorded
from support.marks import slow_except
from support.models import save_model
from support.reference import decisive_prompts
from support.vocabularies import byte_level, give, sentencepiece

NEW_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
BYTE_LEVEL = 400
SENTENCEPIECE = 656
PADDING = 16


def pairs_of(shared: VocabularyMap) -> dict[int, int]:
    assert shared.target_ids is not None
    assert shared.draft_ids is not None
    return dict(zip(shared.target_ids.tolist(), shared.draft_ids.tolist(), strict=True))


def match(target: PreTrainedTokenizerFast, draft: PreTrainedTokenizerFast) -> tuple[VocabularyMap, dict[str, str]]:
    """The map, and its pairs as they are written."""
    shared = match_vocabularies(target, draft, len(target), len(draft))
    names = {
        target.convert_ids_to_tokens(one): draft.convert_ids_to_tokens(other) for one, other in pairs_of(shared).items()
    }
    return shared, names


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokens_that_mean_the_same_are_paired(kind: str) -> None:
    shared, names = match(byte_level(), sentencepiece(kind=kind))
    assert len(names) == shared.size
    assert names["Ġthe"] == "▁the"
    assert names["Ġ"] == "▁"
    assert names["Ċ"] == "<0x0A>"
    assert names["Ã"] == "<0xC3>"
    assert names["<|endoftext|>"] == "</s>"
    assert "<|pad|>" not in names
    letters = [name for name in names if len(name) == 1 and name.isalpha() and name.isascii()]
    has_piece = sentencepiece(kind=kind).get_vocab()
    assert len(letters) > 50
    for letter in letters:
        assert names[letter] == (letter if letter in has_piece else f"<0x{ord(letter):02X}>"), letter
    _, back = match(sentencepiece(kind=kind), byte_level())
    assert back == {draft: target for target, draft in names.items()}


def test_the_pairs_decode_to_the_same_text() -> None:
    target, draft = byte_level(), sentencepiece()
    shared, _ = match(target, draft)
    compared = 0
    for one, other in pairs_of(shared).items():
        piece = draft.convert_ids_to_tokens(other)
        if piece.startswith("<") and len(piece) > 1:
            continue
        assert target.decode([one]) == piece.replace("▁", " ")
        compared += 1
    assert compared > 150


def test_pairs_are_one_to_one_in_order_of_target_ids() -> None:
    pairs = pairs_of(match(sentencepiece(), byte_level())[0])
    assert len(set(pairs.values())) == len(pairs)
    assert all(a < b for a, b in pairwise(pairs))


def test_two_sentencepiece_vocabularies_share_their_byte_tokens() -> None:
    _, names = match(sentencepiece(), sentencepiece(kind="unigram"))
    assert names["<0xC3>"] == "<0xC3>"
    assert names["<0x4D>"] == "<0x4D>"
    assert names["M"] == "M"
    assert names["<unk>"] == "<unk>"


def test_what_the_draft_does_not_know_is_its_unknown_token() -> None:
    for target, draft, unknown in (
        (byte_level(), sentencepiece(), sentencepiece().unk_token_id),
        (sentencepiece(), byte_level(), byte_level().pad_token_id),
    ):
        size = len(target) + PADDING
        shared = match_vocabularies(target, draft, size, len(draft))
        pairs = pairs_of(shared)
        assert shared.unknown == unknown
        assert list(shared.to_draft(range(size))) == [pairs.get(token, unknown) for token in range(size)]
        assert len(pairs) < len(target)


def test_without_an_unknown_token_one_that_carries_no_text_stands_in() -> None:
    draft = byte_level()
    assert match_vocabularies(sentencepiece(), draft, SENTENCEPIECE, BYTE_LEVEL).unknown == draft.pad_token_id


@pytest.mark.parametrize(("target_size", "draft_size"), [(400, 416), (416, 400), (400, 384), (400, 400)])
def test_a_padded_or_cut_vocabulary_of_the_same_tokenizer_keeps_its_ids(target_size: int, draft_size: int) -> None:
    shared = match_vocabularies(byte_level(), byte_level(), target_size, draft_size)
    size = min(target_size, draft_size)
    assert (shared.size, shared.target_ids, shared.draft_ids) == (size, None, None)
    assert shared.is_target_whole == (draft_size >= target_size)
    tokens = list(range(target_size))
    assert list(shared.to_draft(tokens)) == [token if token < size else shared.unknown for token in tokens]
    reported = shared.reported_ids(torch.device("cpu"))
    assert (reported is None) == shared.is_target_whole
    if reported is not None:
        assert reported.tolist() == list(range(size))
    logits = torch.arange(draft_size)[None]
    assert shared.restrict(logits).tolist() == [list(range(size))]


def test_other_added_tokens_are_told_apart_by_name(tmp_path: Path) -> None:
    target = PreTrainedTokenizerFast.from_pretrained(give(tmp_path / "a", byte_level(), "<|user|>", "<|end|>"))
    draft = PreTrainedTokenizerFast.from_pretrained(give(tmp_path / "b", byte_level(), "<|tool|>", "<|user|>"))
    shared, names = match(target, draft)
    pairs = pairs_of(shared)
    assert shared.size == BYTE_LEVEL + 1
    assert names["<|user|>"] == "<|user|>"
    assert "<|end|>" not in names
    assert {token: pairs[token] for token in range(BYTE_LEVEL)} == {token: token for token in range(BYTE_LEVEL)}


def test_more_added_tokens_behind_the_same_ones_change_nothing(tmp_path: Path) -> None:
    target = PreTrainedTokenizerFast.from_pretrained(give(tmp_path / "a", byte_level(), "<|user|>"))
    draft = PreTrainedTokenizerFast.from_pretrained(give(tmp_path / "b", byte_level(), "<|user|>", "<|tool|>"))
    shared = match_vocabularies(target, draft, 416, 416)
    assert (shared.target_ids, shared.size) == (None, 416)


# ---- in the engine ---------------------------------------------------------------------------------------------------


def transplant(target: Path, folder: Path, pairs: dict[int, int], draft_size: int) -> Path:
    """A draft that thinks as the target does about the paired tokens, and is sure of all others."""
    save_model(folder, "llama", vocab_size=draft_size, seed=5, num_hidden_layers=2)
    tensors = load_file(target / "model.safetensors")
    own = load_file(folder / "model.safetensors")
    targets, drafts = torch.tensor(list(pairs)), torch.tensor(list(pairs.values()))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = own[name].clone()
        if name == "lm_head.weight":
            rows *= 3
        rows[drafts] = tensors[name][targets]
        tensors[name] = rows
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


Tokenizers = tuple[PreTrainedTokenizerFast | None, PreTrainedTokenizerFast | None]


def _cases() -> dict[str, tuple[int, int, Any]]:
    """Width of the target, width of the draft, and the tokenizers of both."""
    return {
        "draft wider": (400, 416, lambda: (byte_level(), byte_level())),
        "draft narrower": (416, 400, lambda: (byte_level(), byte_level())),
        "draft cut short": (400, 340, lambda: (byte_level(), byte_level())),
        "byte level, SentencePiece": (416, 672, lambda: (byte_level(), sentencepiece())),
        "SentencePiece, byte level": (656, 400, lambda: (sentencepiece(), byte_level())),
        "byte level, unigram": (400, 656, lambda: (byte_level(), sentencepiece(kind="unigram"))),
        "longer byte level": (500, 400, lambda: (byte_level(500), byte_level(400))),
        "no draft tokenizer": (400, 416, lambda: (byte_level(), None)),
        "no target tokenizer": (416, 400, lambda: (None, byte_level())),
        "no tokenizer": (400, 400, lambda: (None, None)),
    }


@pytest.mark.parametrize(
    ("case", "method"),
    slow_except(
        [(case, method) for case in _cases() for method in ("greedy", "probabilistic")],
        *((case, "greedy") for case in _cases()),
        ("draft wider", "probabilistic"),
        ("byte level, SentencePiece", "probabilistic"),
    ),
)
def test_output_is_exact_and_only_shared_tokens_are_drafted(tmp_path: Path, case: str, method: str) -> None:
    target_size, draft_size, make = _cases()[case]
    tokenizers: Tokenizers = make()
    target = save_model(tmp_path / "target", "llama", vocab_size=target_size, eos_token_id=None, num_hidden_layers=2)
    shared = match_vocabularies(*tokenizers, target_size, draft_size)
    pairs = {token: token for token in range(shared.size)} if shared.target_ids is None else pairs_of(shared)
    draft = transplant(target, tmp_path / "draft", pairs, draft_size)
    for folder, tokenizer in zip((target, draft), tokenizers, strict=True):
        if tokenizer is not None:
            give(folder, tokenizer)
    prompts = decisive_prompts(target, 4, NEW_TOKENS, target_size)
    options, made = recorded(draft, draft_sample_method=method)
    with LLM(target, skip_tokenizer_init=True, strict=True, memory="64MiB", **options) as llm:
        forward, seen = made[0].inner.model.forward, set()

        def spy(rows: Any, **keys: Any) -> Any:
            for row in rows:
                seen.update(row.tokens)
            return forward(rows, **keys)

        made[0].inner.model.forward = spy  # type: ignore[method-assign]
        outputs = llm.generate([prompt for prompt, _ in prompts], GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in prompts]
        sampled = SamplingParams(temperature=1.0, max_tokens=8)
        llm.generate([prompt for prompt, _ in prompts], sampled)
        stats = llm.engine.stats
        before = (stats.num_draft_tokens, stats.num_accepted_draft_tokens)
        within = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, allowed_token_ids=list(pairs))
        llm.generate([list(pairs)[start : start + 7] for start in (5, 30, 70, 99)], within)
        drafts, accepted = stats.num_draft_tokens - before[0], stats.num_accepted_draft_tokens - before[1]
    drafted = {token for _, tokens, _ in made[0].proposals for token in tokens}
    assert len(drafted) > 10
    assert drafted <= set(pairs)
    assert seen <= {*pairs.values(), shared.unknown}
    assert accepted > 0.95 * drafts, "within what both know, draft and target are the same model"
    for _, tokens, probs in made[0].proposals:
        if probs is not None and probs.token_ids is not None:
            assert probs.token_ids.tolist() == list(pairs)
            assert probs.values.shape == (len(tokens), len(pairs))


def test_committed_tokens_outside_the_drafts_vocabulary_are_given_to_it_as_unknown(tmp_path: Path) -> None:
    target = give(save_model(tmp_path / "target", "llama", vocab_size=BYTE_LEVEL, eos_token_id=None), byte_level())
    draft = give(save_model(tmp_path / "draft", "llama", vocab_size=SENTENCEPIECE), sentencepiece())
    pairs = pairs_of(match_vocabularies(byte_level(), sentencepiece(), BYTE_LEVEL, SENTENCEPIECE))
    outside = [token for token in range(BYTE_LEVEL) if token not in pairs][:2]
    inside = list(pairs)[20:23]
    prompt = [inside[0], outside[0], inside[1], outside[1], inside[2]]
    unknown = sentencepiece().unk_token_id
    options, made = recorded(draft)
    with LLM(target, skip_tokenizer_init=True, strict=True, memory="64MiB", **options) as llm:
        forward, first = made[0].inner.model.forward, []
        made[0].inner.model.forward = lambda rows, **keys: (first.append(list(rows[0].tokens)), forward(rows, **keys))[
            1
        ]
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6))
    assert first[0][:5] == [pairs[inside[0]], unknown, pairs[inside[1]], unknown, pairs[inside[2]]]


def test_vocabularies_with_too_little_in_common_are_refused_with_the_figure(tmp_path: Path) -> None:
    target = give(save_model(tmp_path / "target", "llama", vocab_size=BYTE_LEVEL), byte_level())
    words = {"a": 0, "b": 1, "self": 2, **{f"étranger{i}": i for i in range(3, 200)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="étranger3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    draft = save_model(tmp_path / "draft", "llama", vocab_size=200)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(draft)
    options, _ = recorded(draft)
    expected = r"share 3 tokens, 1\.5% of the smaller vocabulary \(target 400, draft 200\)"
    with pytest.raises(ConfigurationError, match=expected):
        LLM(target, skip_tokenizer_init=True, memory="64MiB", **options)


@pytest.mark.parametrize("side", ["draft", "target"])
def test_a_missing_tokenizer_is_named_where_the_sizes_differ(caplog: pytest.LogCaptureFixture, side: str) -> None:
    tokenizers = {"draft": (byte_level(), None), "target": (None, byte_level())}[side]
    with caplog.at_level(logging.WARNING, "specplug.draft_model"):
        shared = match_vocabularies(*tokenizers, 416, 400)
    assert shared.size == 400
    (record,) = caplog.records
    assert f"the {side} has no tokenizer" in record.getMessage()
    assert "416 (target) and 400 (draft)" in record.getMessage()


def test_a_missing_tokenizer_is_no_news_where_the_sizes_agree(caplog: pytest.LogCaptureFixture) -> None:
    match_vocabularies(byte_level(), None, 400, 400)
    assert not caplog.records
