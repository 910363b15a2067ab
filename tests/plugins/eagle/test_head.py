"""The draft head as a module: adopted tensors, borrowed tables, gradients, dtypes, RoPE."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from attention_forms import UnrolledAttend, unrolled_logits
from checkpoint_files import GOLDEN, golden_of, handle_of, open_head
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specplug.errors import CheckpointError
from specplug_eagle.checkpoint import EagleCheckpoint
from specplug_eagle.head import DraftHead, HeadSpec, RopeSpec
from specplug_eagle.head.rope import RotaryEmbedding

pytestmark = pytest.mark.unit

SPEC = HeadSpec("eagle3", 16, 16, 40, 24, 4, 2, 4, 24, has_own_embedding=True)
SPECS = {
    "plain": SPEC,
    "everything": attrs.evolve(
        SPEC,
        num_layers=2,
        windows=(None, 3),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=True,
        fc_norm=True,
        fc_bias=True,
        norm_before_residual=True,
        norm_output=True,
        rope=RopeSpec(rope_type="yarn", parameters={"factor": 4.0, "original_max_position_embeddings": 16}),
    ),
    "eagle1": attrs.evolve(SPEC, family="eagle1", num_aux_states=1, has_own_lm_head=False, draft_vocab_size=40),
}


def random_head(spec: HeadSpec, dtype: torch.dtype = torch.float32) -> DraftHead:
    torch.manual_seed(0)
    output = (
        torch.randn(spec.vocab_size, spec.hidden_size).to(dtype) / 4
    )  # its stream differs by dtype in some versions
    head = DraftHead(spec, dtype=dtype, logits=lambda states: states @ output.T)
    head.reset_parameters(0.2)
    return head


def inputs(spec: HeadSpec, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(6, spec.feature_size, generator=generator).to(dtype)
    return features, torch.randint(0, spec.vocab_size, (6,), generator=generator)


@pytest.mark.parametrize("kind", SPECS)
def test_parameters_are_what_the_spec_says(kind: str) -> None:
    head = random_head(SPECS[kind])
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == SPECS[kind].tensor_shapes()


def test_fresh_parameters_are_normal_and_norms_one() -> None:
    torch.manual_seed(0)
    head = DraftHead(SPEC)
    assert 0.015 < float(head.get_parameter("fc.weight").detach().std()) < 0.025
    assert torch.equal(head.get_parameter("norm.weight"), torch.ones(16))
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_loaded_tensors_are_adopted_not_copied() -> None:
    handle = handle_of(GOLDEN / "speculators_default")
    checkpoint = EagleCheckpoint.open(handle)
    handle.keep(checkpoint.names.values())
    handle.materialize(lambda done: None)
    head, _ = checkpoint.build(handle.tensors)
    for name, parameter in head.named_parameters():
        assert parameter.data_ptr() == handle.tensors[checkpoint.names[name]].data_ptr()
        assert not parameter.requires_grad


def test_tensors_made_without_gradients_for_ever_are_adopted_too() -> None:
    with torch.inference_mode():
        tensors = {name: torch.zeros(shape) for name, shape in SPEC.tensor_shapes().items()}
        head = DraftHead.from_tensors(SPEC, tensors)
        features, ids = inputs(SPEC)
        assert not unrolled_logits(head, features, ids, 2)[1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.weight"), "lacks 'fc.weight'"),
        (lambda t: t.update(extra=torch.zeros(1)), "does not use 'extra'"),
        (lambda t: t.update({"norm.weight": torch.zeros(15)}), r"'norm.weight' has the shape \[15\] where \[16\]"),
    ],
)
def test_wrong_tensors_are_named(change: Any, message: str) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SPEC.tensor_shapes().items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        DraftHead.from_tensors(SPEC, tensors)


def test_what_is_not_lent_is_named() -> None:
    head = DraftHead(attrs.evolve(SPEC, has_own_embedding=False, has_own_lm_head=False, draft_vocab_size=40))
    with pytest.raises(CheckpointError, match="no embed_tokens"):
        head.embed(torch.tensor([1]))
    with pytest.raises(CheckpointError, match="no lm_head"):
        head.logits(torch.zeros(1, 16))


def test_a_borrowed_module_is_no_part_of_the_head() -> None:
    table = torch.nn.Embedding(40, 16)
    head = DraftHead(attrs.evolve(SPEC, has_own_embedding=False), embed=table)
    assert torch.equal(head.embed(torch.tensor([3])), table.weight[[3]])
    assert not any(parameter is table.weight for parameter in head.parameters())


@pytest.mark.parametrize("kind", SPECS)
def test_every_parameter_gets_the_right_gradient(kind: str) -> None:
    head = random_head(SPECS[kind], torch.float64)
    features, ids = inputs(SPECS[kind], torch.float64)

    def loss() -> torch.Tensor:
        return torch.stack([step.logsumexp(-1).sum() for step in unrolled_logits(head, features, ids, 3)]).sum()

    loss().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        index = int(parameter.grad.abs().argmax())
        analytic, step = float(parameter.grad.view(-1)[index]), 1e-5
        with torch.no_grad():
            parameter.view(-1)[index] += step
            above = float(loss())
            parameter.view(-1)[index] -= 2 * step
            below = float(loss())
            parameter.view(-1)[index] += step
        assert analytic != 0, name
        # RoPE's cosines are float32, which does not matter: they are constants.
        assert abs((above - below) / (2 * step) - analytic) < 1e-5 * max(1.0, abs(analytic)), name


@pytest.mark.parametrize("kind", SPECS)
def test_bfloat16_stays_bfloat16_and_near(kind: str) -> None:
    exact, low = random_head(SPECS[kind]), random_head(SPECS[kind], torch.bfloat16)
    low.load_state_dict({name: value.bfloat16() for name, value in exact.state_dict().items()})
    features, ids = inputs(SPECS[kind])
    with torch.no_grad():
        for one, other in zip(
            unrolled_logits(exact, features, ids, 3), unrolled_logits(low, features.bfloat16(), ids, 3), strict=True
        ):
            assert other.dtype == torch.bfloat16
            assert float((one - other.float()).abs().max()) < 0.15 * float(one.abs().max())


@pytest.mark.parametrize(
    ("case", "override"),
    [
        ("speculators_default", {"norm_before_residual": True}),
        ("speculators_default", {"norm_output": True}),
        ("speculators_default", {"rope_theta": 100.0}),
        ("speculators_norm_before_residual", {"norm_before_residual": False}),
        ("speculators_norm_output", {"norm_output": False}),
    ],
)
def test_overrides_change_the_logits(case: str, override: dict[str, Any]) -> None:
    features, ids, expected = golden_of(GOLDEN / case)
    _, head, _ = open_head(GOLDEN / case, **override)
    with torch.no_grad():
        logits = unrolled_logits(head, features, ids, 2)[1]
    assert float((logits - expected[1, : len(logits)]).abs().max()) > 1e-2


@pytest.mark.parametrize("case", ["linear", "llama3", "yarn", "theta"])
def test_rope_settings_matter_to_their_goldens(case: str) -> None:
    features, ids, expected = golden_of(GOLDEN / f"speculators_{case}")
    checkpoint, head, _ = open_head(GOLDEN / f"speculators_{case}")
    head.rope = RotaryEmbedding(RopeSpec(), checkpoint.spec.head_dim)
    with torch.no_grad():
        logits = unrolled_logits(head, features, ids, 1)[0]
    assert float((logits - expected[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("positions", [range(3), range(40, 60), [0, 7, 31, 500]])
def test_dynamic_rope_of_a_token_is_that_of_a_sequence_ending_with_it(positions: Any) -> None:
    settings = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(hidden_size=8, num_attention_heads=1, max_position_embeddings=32, rope_parameters=settings)
    spec = RopeSpec(rope_type="dynamic", parameters={"factor": 4.0}, max_position_embeddings=32)
    cosine, sine = RotaryEmbedding(spec, 8)(torch.tensor(list(positions)), torch.float32)
    for row, position in enumerate(positions):
        inverse, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=position + 1)
        angle = torch.cat((position * inverse, position * inverse))
        torch.testing.assert_close(cosine[row], angle.cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sine[row], angle.sin(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["default", "dynamic", "yarn"])
def test_everything_stays_on_the_heads_device(kind: Any) -> None:
    # Without an accelerator: operations between `meta` and the CPU are refused like those between two devices.
    meta = torch.device("meta")
    spec = attrs.evolve(SPECS["everything"], rope=RopeSpec(rope_type=kind, parameters={"factor": 2.0}))
    head = DraftHead(spec, device=meta)
    ids = torch.zeros(3, dtype=torch.int64, device=meta)
    features = torch.zeros(3, 48, device=meta)
    result = head(head.embed(ids), head.fuse(features), ids, lambda layer, query, *rest: query.transpose(0, 1))
    assert result.feedback.device == meta
    assert head.logits(result.output).shape == (3, 24)


def test_a_head_keeps_nothing_between_calls() -> None:
    head = random_head(SPEC)
    features, ids = inputs(SPEC)
    with torch.no_grad():
        first = unrolled_logits(head, features, ids, 3)
        head(head.embed(ids[:2]), head.fuse(features[:2]), torch.arange(2) + 9, UnrolledAttend(2))
        for one, other in zip(first, unrolled_logits(head, features, ids, 3), strict=True):
            assert torch.equal(one, other)
