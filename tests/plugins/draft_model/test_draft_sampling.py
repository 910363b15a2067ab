"""Sampled output keeps the target's distribution, and what is reported of drafts is what they were drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specplug import LLM, BlockTable, Budget, ProposalBatch, ProposalRow, SamplingParams, TokenView
from specplug.testing.models import save_words, word
from support.drafting import drafted_by, perturbed_copy, speculator_of
from support.marks import slow_except
from support.models import save_model
from support.reference import MARGIN, load_reference
from support.statistics import THRESHOLD, worst_p_value
from support.stepwise import Stepwise, distributions

V = 16
DRAFT_V = 14
PROMPT = [3, 7, 5, 7, 7, 3]
COMMON: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True, "detokenize": False}
PARAMS = {
    "temperature": SamplingParams(temperature=0.7, **COMMON),
    "top-p": SamplingParams(temperature=1.2, top_p=0.85, **COMMON),
    "top-k": SamplingParams(temperature=1.1, top_k=6, **COMMON),
    "min-p": SamplingParams(temperature=1.0, min_p=0.08, **COMMON),
    "penalties": SamplingParams(
        temperature=0.9, repetition_penalty=1.4, presence_penalty=0.8, frequency_penalty=-1.5, **COMMON
    ),
}
SHARED = {target: draft for draft, target in enumerate((9, 3, 14, 7, 5, 2, 11, 0, 12, 6))}
"""Target id → draft id of the words that both know."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Stepwise:
    folder = tmp_path_factory.mktemp("sixteen")
    save_model(folder, "llama", vocab_size=V, num_hidden_layers=1, initializer_range=0.2, eos_token_id=None)
    return Stepwise(save_words(folder, V))


@pytest.fixture(scope="module")
def joints(reference: Stepwise) -> dict[str, np.ndarray]:
    return {name: reference.joint_of_three(PROMPT, params) for name, params in PARAMS.items()}


@pytest.fixture(scope="module")
def drafts(reference: Stepwise, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A draft with the target's vocabulary, and one that shares ten words under other ids and has four of its own."""
    options: dict[str, Any] = {"seed": 9, "num_hidden_layers": 1, "initializer_range": 0.1}
    same = perturbed_copy(reference.folder, tmp_path_factory.mktemp("same") / "model", 0.5)
    other = save_model(tmp_path_factory.mktemp("other"), "gpt_neox", vocab_size=DRAFT_V, **options)
    words = {word(target): draft for target, draft in SHARED.items()}
    words |= {f"other{draft}": draft for draft in range(len(SHARED), DRAFT_V)}
    save_vocabulary(other, words, unknown=f"other{DRAFT_V - 1}")
    return {"same": same, "other": other}


def save_vocabulary(folder: Path, words: dict[str, int], unknown: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown).save_pretrained(folder)


def engine(folder: Path, **options: Any) -> LLM:
    sizes: dict[str, Any] = {"max_num_seqs": 400, "max_num_batched_tokens": 4000, "memory": "256MiB"}
    return LLM(folder, strict=True, check_parity=False, **sizes, **options)


def samples_of(llm: LLM, params: list[SamplingParams]) -> np.ndarray:
    outputs = llm.generate([PROMPT] * len(params), params)
    return np.array([output.outputs[0].token_ids[:3] for output in outputs])


def accepted_of_greedy(samples: np.ndarray, draft: Path) -> tuple[int, int]:
    """How many of the second and third tokens a greedy draft must have got right, whatever was sampled: (least, most).

    A draft reaches no further with four tokens wanted, and each of the two is drafted from what is committed. The bounds
    differ where the draft's two likeliest tokens are closer than rounding.
    """
    least = most = 0
    for length in (1, 2):
        prefixes, places = np.unique(samples[:, :length], axis=0, return_inverse=True)
        history = torch.tensor([[*PROMPT, *prefix] for prefix in prefixes.tolist()])
        with torch.no_grad():
            logits = load_reference(draft)(history).logits[:, -1]
        right = torch.from_numpy(samples[:, length])[:, None]
        own = logits[torch.from_numpy(places.ravel())].gather(1, right)[:, 0]
        others = logits[torch.from_numpy(places.ravel())].scatter(1, right, float("-inf")).amax(dim=-1)
        least += int((own > others + MARGIN).sum())
        most += int((own > others - MARGIN).sum())
    return least, most


@pytest.mark.parametrize(
    ("method", "times"),
    slow_except([("greedy", 2000), ("probabilistic", 2000), ("probabilistic", 800)], ("probabilistic", 800)),
)
def test_joint_of_three_tokens(
    reference: Stepwise, joints: dict[str, np.ndarray], drafts: dict[str, Path], method: str, times: int
) -> None:
    """All sampling parameters side by side in the same batches."""
    names = list(PARAMS) * times
    with engine(reference.folder, **drafted_by(drafts["same"], 3, draft_sample_method=method)) as llm:
        samples = samples_of(llm, [PARAMS[name] for name in names])
        accepted, drafted = llm.engine.stats.num_accepted_draft_tokens, llm.engine.stats.num_draft_tokens
        if method == "greedy":
            least, most = accepted_of_greedy(samples, drafts["same"])
            assert least <= accepted <= most
            assert 500 < least <= most < 1.01 * least
        else:
            assert len(names) / 8 < accepted
        assert accepted < drafted
    for place, name in enumerate(PARAMS):
        assert worst_p_value(samples[place :: len(PARAMS)], joints[name]) > THRESHOLD, name


@pytest.mark.parametrize("method", slow_except(["greedy", "probabilistic"], "probabilistic"))
def test_joint_of_three_tokens_with_another_vocabulary(
    reference: Stepwise, joints: dict[str, np.ndarray], drafts: dict[str, Path], method: str
) -> None:
    names = ["temperature", "top-p"] * 2000
    with engine(reference.folder, **drafted_by(drafts["other"], 3, draft_sample_method=method)) as llm:
        assert speculator_of(llm).vocabulary.size == len(SHARED)
        samples = samples_of(llm, [PARAMS[name] for name in names])
        assert len(names) / 10 < llm.engine.stats.num_accepted_draft_tokens < llm.engine.stats.num_draft_tokens
    for place, name in enumerate(("temperature", "top-p")):
        assert worst_p_value(samples[place::2], joints[name]) > THRESHOLD, name


def test_drafts_that_stop_where_the_draft_is_unsure_keep_the_distribution(
    reference: Stepwise, joints: dict[str, np.ndarray], drafts: dict[str, Path]
) -> None:
    counts = []
    for threshold in (0.0, 0.3):
        options = drafted_by(
            drafts["same"], 3, draft_sample_method="probabilistic", draft_confidence_threshold=threshold
        )
        with engine(reference.folder, **options) as llm:
            samples = samples_of(llm, [PARAMS["temperature"]] * (4000 if threshold else 400))
            counts.append(llm.engine.stats.num_draft_tokens / len(samples))
            assert llm.engine.stats.num_accepted_draft_tokens > 0
    assert worst_p_value(samples, joints["temperature"]) > THRESHOLD
    assert 0 < counts[1] < 0.8 * counts[0]


def rows_of(llm: LLM, count: int, sampling: SamplingParams, seed: int) -> list[ProposalRow]:
    """New rows that all hold the same prompt, each in blocks and with a random stream of its own."""
    size = llm.engine.plan.block_size
    rows = []
    for index in range(count):
        table = BlockTable(size)
        table.extend([index])
        generator = torch.Generator().manual_seed(seed * count + index)
        rows.append(
            ProposalRow(
                row_id=index,
                is_new=True,
                tokens=TokenView(PROMPT),
                new_positions=range(len(PROMPT) - 1),
                budget=Budget(3, 3),
                sampling=sampling,
                table=table,
                generator=lambda generator=generator: generator,
            )
        )
    return rows


@pytest.mark.parametrize("which", slow_except(["same", "other"], "other"))
def test_reported_distributions_are_the_empirical_ones(
    reference: Stepwise, drafts: dict[str, Path], which: str
) -> None:
    """Drafted triples over many rows against the product of what was reported, and that against the draft alone."""
    sampling = SamplingParams(temperature=0.8, top_p=0.95)
    joint = np.zeros((V, V, V))
    drawn: list[list[int]] = []
    reports: dict[tuple[int, ...], np.ndarray] = {}
    options = drafted_by(drafts[which], 3, draft_sample_method="probabilistic")
    with engine(reference.folder, max_model_len=16, block_size=16, **options) as llm:
        speculator = speculator_of(llm)
        for seed in range(50):
            proposal = speculator.propose(ProposalBatch(rows_of(llm, 400, sampling, seed)))
            assert proposal.probs is not None
            for tokens, probs in zip(proposal.tokens, proposal.probs, strict=True):
                assert len(tokens) == 3
                assert probs is not None
                drawn.append(list(tokens))
                if tuple(tokens) in reports and seed:
                    continue
                for depth in range(3):
                    values = np.zeros(V)
                    ids = range(V) if probs.token_ids is None else probs.token_ids.tolist()
                    values[list(ids)] = probs.values[depth].cpu().numpy()
                    known = reports.setdefault(tuple(tokens[:depth]), values)
                    assert np.allclose(known, values, atol=1e-5)
                reports[tuple(tokens)] = values
    for prefix, values in reports.items():
        if len(prefix) == 2:
            joint[prefix] = reports[()][prefix[0]] * reports[prefix[:1]][prefix[1]] * values
    assert 0.999 < joint.sum() < 1.0001
    assert worst_p_value(np.array(drawn), joint) > THRESHOLD

    ids = list(range(V)) if which == "same" else sorted(SHARED)
    to_draft = {token: token for token in range(V)} if which == "same" else SHARED
    for prefix in ((), (drawn[0][0],), tuple(drawn[0][:2])):
        history = torch.tensor([[to_draft.get(token, DRAFT_V - 1) for token in (*PROMPT, *prefix)]])
        with torch.no_grad():
            logits = load_reference(drafts[which])(history).logits[:, -1]
        logits = logits[:, [to_draft[token] for token in ids]]
        expected = distributions(logits, history, sampling)[0]
        assert np.allclose(reports[prefix][ids], expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(("temperature", "method"), [(0.0, "greedy"), (0.0, "probabilistic"), (1.0, "probabilistic")])
def test_the_target_as_its_own_draft_is_always_accepted(
    reference: Stepwise, tmp_path: Path, temperature: float, method: str
) -> None:
    folder = save_model(tmp_path, "qwen3", eos_token_id=None, initializer_range=0.2)
    params = SamplingParams(temperature=temperature, max_tokens=101, ignore_eos=True)
    prompts = [list(range(3, 3 + length)) for length in (4, 9, 14, 30)] * 4
    with LLM(
        folder, skip_tokenizer_init=True, strict=True, memory="64MiB", **drafted_by(folder, draft_sample_method=method)
    ) as llm:
        llm.generate(prompts, params)
        stats = llm.engine.stats
    assert stats.num_draft_tokens > 1000
    if temperature:
        assert stats.num_accepted_draft_tokens >= 0.999 * stats.num_draft_tokens
    else:
        assert stats.num_accepted_draft_tokens == stats.num_draft_tokens


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_a_seeded_request_is_that_of_plain_decoding(reference: Stepwise, drafts: dict[str, Path], method: str) -> None:
    params = [SamplingParams(temperature=0.9, top_p=0.9, seed=seed, max_tokens=20) for seed in range(6)]
    with LLM(reference.folder, memory="64MiB", strict=True) as llm:
        alone = [output.outputs[0].token_ids for output in llm.generate([PROMPT] * 6, params)]
    options = drafted_by(drafts["other"], draft_sample_method=method)
    with LLM(reference.folder, memory="64MiB", strict=True, **options) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate([PROMPT] * 6, params)] == alone
        assert llm.engine.stats.num_accepted_draft_tokens > 0
