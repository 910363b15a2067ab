"""Other methods and variants, recognised by their configuration and refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from specplug import CheckpointError
from specplug_eagle.checkpoint.config import DraftConfig

_METHODS = {
    "peagle": "parallel drafting (P-EAGLE)",
    "p-eagle": "parallel drafting (P-EAGLE)",
    "dflash": "DFlash",
    "medusa": "Medusa",
    "mlp_speculator": "an MLP speculator",
    "mlp": "an MLP speculator",
    "mtp": "multi-token prediction (MTP)",
    "independent": "an independent draft model",
}
_PARALLEL = ("mask_token_id", "ptd_token_id", "pard_token_id")
_MODELS = {
    "minicpm": "MiniCPM's EAGLE variant",
    "cohere": "Cohere's EAGLE variant",
    "llama4": "Llama 4's EAGLE variant",
    "gemma": "a draft of Gemma layers",
}
# What EAGLE-3 means, in ModelOpt's words; another value is another network.
_MODELOPT = {
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "eh_proj_before_attn": False,
}


def refuse_other_variants(config: DraftConfig) -> None:
    """Raises `CheckpointError` if a configuration asks for a method or variant that is known but not implemented."""
    nested = config.flag("speculators_config")
    algorithm = nested.get("algorithm") if isinstance(nested, Mapping) else None
    for name, value in (
        ("speculators_model_type", config.flag("speculators_model_type")),
        ("algorithm", algorithm or config.flag("algorithm")),
        ("method", config.flag("method")),
    ):
        stated = str(value or "").lower()
        if stated in _METHODS:
            raise CheckpointError(f"this is {_METHODS[stated]}, not EAGLE (config.json: {name} '{stated}')")
    if config.flag("dflash_config") is not None:
        raise CheckpointError("this is DFlash, not EAGLE (config.json: dflash_config)")
    for name in _PARALLEL:
        if config.flag(name) is not None:
            raise CheckpointError(f"this head drafts in parallel, which is not supported (config.json: {name})")
    if config.flag("parallel_drafting"):
        raise CheckpointError("this head drafts in parallel, which is not supported (config.json: parallel_drafting)")
    step = config.flag("parallel_draft_step")
    if step not in (None, 1):
        raise CheckpointError(
            f"this head drafts {step} tokens in parallel, which is not supported (parallel_draft_step)"
        )
    for name, expected in _MODELOPT.items():
        stated_flag = config.switch(name)
        if stated_flag is not None and stated_flag != expected:
            raise CheckpointError(
                f"config.json says {name}: {str(stated_flag).lower()}; only the usual EAGLE-3 network "
                f"({name}: {str(expected).lower()}) is supported"
            )
    if config.flag("layernorms"):
        raise CheckpointError("this is an EAGLE-1 head with extra layer norms (HASS), which is not supported")
    kind = str(config.layer.get("model_type") or "").lower()
    for prefix, what in _MODELS.items():
        if kind.startswith(prefix):
            raise CheckpointError(f"this is {what}, which is not supported (config.json: model_type '{kind}')")
