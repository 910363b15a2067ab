"""A new head for a target."""

from __future__ import annotations

import torch

from specplug import ConfigurationError
from specplug_eagle.checkpoint import resolve_layer_ids, validate, write_speculators_checkpoint
from specplug_eagle.head import DraftHead, HeadSpec, RopeSpec
from specplug_eagle.train.options import HeadOptions
from specplug_eagle.train.target import Target

DEFAULT_STATES = 3


def head_spec(options: HeadOptions, target: Target) -> HeadSpec:
    """Fills in options that the user did not set from the target.

    Raises:
        ConfigurationError: invalid sizes, or sizes that do not fit the target.
    """
    config = target.config
    hidden = options.hidden_size or target.hidden_size
    heads = options.num_heads or config.num_attention_heads
    own = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kv_heads = options.num_kv_heads or (own if heads % own == 0 else heads)
    head_dim = options.head_dim or getattr(config, "head_dim", None) or hidden // heads
    draft_vocab = options.draft_vocab_size or target.vocab_size
    if heads % kv_heads:
        raise ConfigurationError(f"{heads} heads cannot share {kv_heads} key and value heads evenly")
    if head_dim % 2:
        raise ConfigurationError(f"a head of {head_dim} cannot be rotated; it must be even")
    if draft_vocab > target.vocab_size:
        raise ConfigurationError(
            f"a draft vocabulary of {draft_vocab} tokens is more than the target's {target.vocab_size}"
        )
    if options.lm_head == "borrow" and draft_vocab != target.vocab_size:
        raise ConfigurationError("a borrowed output layer drafts the whole vocabulary; leave out --draft-vocab-size")
    if options.norm_before_fc and options.fc_norm:
        raise ConfigurationError("--norm-before-fc and --fc-norm exclude each other")
    spec = HeadSpec(
        family="eagle3",
        hidden_size=hidden,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=options.intermediate_size or getattr(config, "intermediate_size", None) or 4 * hidden,
        num_layers=options.num_layers,
        num_aux_states=len(options.layer_ids) if options.layer_ids else DEFAULT_STATES,
        rms_norm_eps=getattr(config, "rms_norm_eps", None) or 1e-6,
        rope=_rope(options, target),
        has_own_lm_head=options.lm_head != "borrow",
        norm_before_residual=options.norm_before_residual,
        norm_before_fc=options.norm_before_fc,
        fc_norm=options.fc_norm,
        norm_output=options.norm_output,
        layer_ids=None if options.layer_ids is None else tuple(sorted(options.layer_ids)),
    )
    validate(spec, target)
    return spec


def boundaries_of(spec: HeadSpec, target: Target) -> tuple[int, ...]:
    """The target states to read, ascending.

    Raises:
        ConfigurationError: the target has no such layers.
    """
    return resolve_layer_ids(spec, target.num_layers).boundaries


def new_head(
    spec: HeadSpec, options: HeadOptions, target: Target, members: torch.Tensor | None, seed: int
) -> DraftHead:
    """Makes a head in float32. Its `fc` starts as a copy of the deepest target state.

    Args:
        spec: what to make.
        options: how its output layer is treated.
        target: gives its embedding, and initial values of output layer and final norm.
        members: int64 [draft vocabulary], target ids; None for all.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    head = DraftHead(
        spec,
        embed=target.embed,
        logits=target.logits if options.lm_head == "borrow" else None,
        draft_to_target=None if members is None else members.cpu(),
    )
    with torch.no_grad():
        if head.fc is not None and spec.hidden_size == spec.target_hidden_size:
            head.fc.weight[:, -spec.hidden_size :] += torch.eye(spec.hidden_size, dtype=torch.float32, device="cpu")
        weight = target.final_norm_weight()
        if head.norm is not None and weight is not None and spec.hidden_size == target.hidden_size:
            head.norm.weight.copy_(weight)
        if head.lm_head is not None and spec.hidden_size == target.hidden_size:
            head.lm_head.weight.copy_(target.output_rows(members))
    if head.lm_head is not None and options.lm_head == "freeze":
        head.lm_head.requires_grad_(False)
    return head.to(target.device).train()


def write_head(folder: str, head: DraftHead, target: Target, boundaries: tuple[int, ...], dtype: torch.dtype) -> None:
    """Writes the head in the speculators format, cast to another dtype than that of training."""
    tensors = {name: value.detach().to(dtype) for name, value in head.state_dict().items()}
    copied = DraftHead.from_tensors(head.spec, tensors, draft_to_target=head.draft_to_target)
    write_speculators_checkpoint(
        folder,
        copied,
        verifier=target.name,
        boundaries=boundaries,
        verifier_architectures=[type(target.model).__name__],
    )


def _rope(options: HeadOptions, target: Target) -> RopeSpec:
    """The target's RoPE base without its scaling."""
    stated = getattr(target.config, "rope_parameters", None) or {}
    theta = options.rope_theta or stated.get("rope_theta") or 10000.0
    longest = getattr(target.config, "max_position_embeddings", None) or 2048
    return RopeSpec(theta=float(theta), max_position_embeddings=int(longest))
