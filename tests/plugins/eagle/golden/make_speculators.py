"""Writes the goldens `speculators_*`: EAGLE-3 heads and their logits, both by the `speculators` package itself.

Needs speculators 0.9.0 in an environment of its own, where torch, transformers, pydantic and safetensors can be imported:

    pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0
    python make_speculators.py                # writes all cases beside this script
    python make_speculators.py check FOLDER   # loads a checkpoint in this format, compares with FOLDER.safetensors

The package's class unrolls its draft steps over a whole sequence with teacher-forced tokens; row t of step s is defined for
t < T - s. Its logits are taken from a hook on `lm_head`, since it returns no more than their maxima.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

# Imported by the package for its data pipeline only.
for name in ("datasets", "openai", "openai.types", "openai.types.chat", "openai.types.completion"):
    sys.modules.setdefault(name, MagicMock())

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from speculators.config import SpeculatorsConfig, VerifierConfig  # noqa: E402
from speculators.models.eagle3.config import Eagle3SpeculatorConfig  # noqa: E402
from speculators.models.eagle3.core import Eagle3DraftModel  # noqa: E402
from speculators.proposals.greedy import GreedyTokenProposalConfig  # noqa: E402
from transformers import LlamaConfig, Qwen3Config  # noqa: E402

TOKENS, STEPS, VOCABULARY, DRAFT = 8, 4, 40, 24
LAYER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **settings}}


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "norm_before_residual": ({"norm_before_residual": True}, {}),
    "norm_before_fc": ({"norm_before_fc": True}, {}),
    "fc_norm": ({"fc_norm": True}, {}),
    "norm_output": ({"norm_output": True}, {}),
    "residual_fc_output": ({"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}, {}),
    "residual_each_output": ({"norm_before_residual": True, "fc_norm": True, "norm_output": True}, {}),
    "two_layers": ({"norm_before_residual": True}, {"num_hidden_layers": 2}),
    "four_states": ({"eagle_aux_hidden_state_layer_ids": [1, 3, 5, 8]}, {}),
    "no_layer_ids": ({"eagle_aux_hidden_state_layer_ids": None}, {}),
    "full_vocabulary": ({"draft_vocab_size": VOCABULARY}, {}),
    "head_dim": ({}, {"head_dim": 6}),
    "biases": ({}, {"attention_bias": True, "mlp_bias": True}),
    "theta": ({}, rope(rope_theta=1e6)),
    "linear": ({}, rope(rope_type="linear", factor=3.0)),
    "llama3": ({}, rope(rope_type="llama3", **LLAMA3)),
    "yarn": ({}, rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "qwen3": ({"norm_before_residual": True}, {"model_type": "qwen3", "head_dim": 6, "attention_bias": True}),
}


def build(flags: dict[str, Any], layer: dict[str, Any]) -> Eagle3DraftModel:
    layer = {**LAYER, **layer}
    kind = Qwen3Config if layer.pop("model_type", "llama") == "qwen3" else LlamaConfig
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=kind(**layer),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="tiny-verifier", architectures=["LlamaForCausalLM"]),
        ),
        **{"draft_vocab_size": DRAFT, "eagle_aux_hidden_state_layer_ids": [2, 4, 5], **flags},
    )
    config.transformer_layer_config._attn_implementation = "eager"
    return Eagle3DraftModel(config).eval()


def randomise(model: Eagle3DraftModel, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if parameter.ndim == 1 and "norm" in name else 0.3 * noise
    if model.t2d is not None:
        members = torch.randperm(VOCABULARY, generator=generator)[:DRAFT].sort().values
        mask = torch.zeros(VOCABULARY, dtype=torch.bool)
        mask[members] = True
        model.load_vocab_mappings(mask, members - torch.arange(DRAFT))


def reference_logits(model: Eagle3DraftModel, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Features [T, n·H] and the tokens after them, int64 [T] → logits [steps, T, draft vocabulary]."""
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[0].detach().clone()))
    length = len(ids)
    with torch.no_grad():
        model(
            features[None],
            ids[None],
            torch.zeros(1, length, dtype=torch.long),
            position_ids=torch.arange(length)[None],
            ttt_steps=STEPS,
        )
    hook.remove()
    return torch.stack(seen)


def make(name: str, folder: Path) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model = build(*CASES[name])
    randomise(model, generator)
    features = torch.randn(TOKENS, model.fc.in_features, generator=generator)
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    logits = reference_logits(model, features, ids)
    model.save_pretrained(folder)
    for extra in set(folder.iterdir()) - {folder / "config.json", folder / "model.safetensors"}:
        extra.unlink()
    save_file({"features": features, "ids": ids, "logits": logits.contiguous()}, folder.with_suffix(".safetensors"))


def check(folder: Path) -> float:
    """The largest difference between the package's logits and those stored with a checkpoint."""
    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel(config).eval()
    state = load_file(folder / "model.safetensors")
    golden = load_file(folder.with_suffix(".safetensors"))
    state.setdefault("embed_tokens.weight", golden.get("target.embed_tokens", torch.empty(0)))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("verifier_") for name in missing), missing
    logits = reference_logits(model, golden["features"], golden["ids"])
    rows = len(golden["ids"])
    return max(float((logits[s, : rows - s] - golden["logits"][s, : rows - s]).abs().max()) for s in range(STEPS))


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        print(check(Path(sys.argv[2])))
    else:
        for case in CASES:
            make(case, Path(__file__).parent / f"speculators_{case}")
