"""Draft logits equal a reference's, on random weights: `golden/make_speculators.py` and `golden/make_plain.py`."""

from __future__ import annotations

import pytest
import torch
from attention_forms import incremental_logits, unrolled_logits
from checkpoint_files import CASES, GOLDEN, golden_of, open_head

pytestmark = pytest.mark.unit

STEPS = 4


def test_every_kind_of_head_has_a_golden() -> None:
    assert len(CASES) == 31
    specs = [open_head(GOLDEN / case)[0].spec for case in CASES]
    for flag in (
        "norm_before_residual",
        "norm_before_fc",
        "fc_norm",
        "norm_output",
        "single_state",
        "fc_bias",
        "qkv_bias",
        "o_bias",
        "mlp_bias",
        "qk_norm",
        "normed_layers",
        "has_own_embedding",
        "has_own_lm_head",
    ):
        assert {getattr(spec, flag) for spec in specs} == {True, False}, flag
    assert {spec.layout for spec in specs} == {"flat", "eagle_config", "speculators", "wrapped"}
    assert {spec.rope.rope_type for spec in specs} == {"default", "linear", "dynamic", "llama3", "yarn"}
    assert {spec.draft_vocab_size < spec.vocab_size for spec in specs} == {True, False}
    assert {spec.num_layers for spec in specs} == {1, 2}


@pytest.mark.parametrize("case", CASES)
def test_logits_of_all_steps_are_the_references(case: str) -> None:
    features, ids, expected = golden_of(GOLDEN / case)
    _, head, _ = open_head(GOLDEN / case)
    assert float(expected[0].std()) > 0.1  # else an absolute bound would say nothing
    with torch.no_grad():
        for step, logits in enumerate(unrolled_logits(head, features, ids, STEPS)):
            torch.testing.assert_close(logits, expected[step, : len(ids) - step], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_logits_with_a_cache_are_the_references(case: str, chunk: int) -> None:
    features, ids, expected = golden_of(GOLDEN / case)
    _, head, _ = open_head(GOLDEN / case)
    with torch.no_grad():
        for step, logits in enumerate(incremental_logits(head, features, ids, STEPS, chunk)):
            ends = range(len(ids)) if step == 0 else range(min(chunk, len(ids)) - 1, len(ids) - step, chunk)
            rows = torch.tensor([row for row in ends if row < len(ids) - step])
            torch.testing.assert_close(logits, expected[step][rows], atol=1e-5, rtol=0)
