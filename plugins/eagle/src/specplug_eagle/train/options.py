"""Options of a head and of a training run. Defaults follow the published recipes; see each attribute."""

from __future__ import annotations

from typing import Literal

import attrs

OutputLayer = Literal["train", "freeze", "borrow"]


@attrs.frozen
class HeadOptions:
    """The head to train; what is None is taken from the target.

    Attributes:
        hidden_size: width of the draft's states. Another than the target's needs its own embedding, so it is refused.
        intermediate_size: width of the MLP.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        num_layers: draft layers.
        layer_ids: the target states to read, as boundaries (b enters layer b); None: 2, L // 2 and L − 3.
        draft_vocab_size: how many of the most frequent tokens the head can draft; None: all.
        lm_head: `train` starts from the target's rows and trains them, `freeze` keeps them, `borrow` uses the target's
            whole output layer and stores none.
        norm_before_residual: on by default: the residual of every draft step starts at the same scale, and every reader
            of the speculators format knows the flag.
        norm_before_fc: one norm over the target states.
        fc_norm: one norm for each target state.
        norm_output: the next step is fed the normed output; readers older than the flag ignore it, so off by default.
        rope_theta: base of the rotary embedding.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_layers: int = 1
    layer_ids: tuple[int, ...] | None = None
    draft_vocab_size: int | None = None
    lm_head: OutputLayer = "train"
    norm_before_residual: bool = True
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    rope_theta: float | None = None


@attrs.frozen
class RunOptions:
    """How to train.

    Attributes:
        steps: draft steps of the unroll.
        step_decay: weight of step s is step_decay^s.
        epochs: passes over the data.
        max_steps: the most optimiser steps, if not None; the schedule ends there.
        max_minutes: the longest that the steps may take, if not None; the schedule is shortened to end then. How far a
            run comes depends on the machine, so that such a run cannot be repeated exactly.
        learning_rate: the peak.
        warmup: part of all steps in which the rate rises.
        weight_decay: of AdamW, for matrices.
        clip: the largest norm of the gradient.
        batch_tokens: the most tokens of a micro-batch, padding included.
        accumulate: micro-batches of an optimiser step.
        seed: of weights and order.
        gamma: draft tokens that the held-out acceptance length is measured with; None: `steps`.
    """

    steps: int = 7
    step_decay: float = 0.8
    epochs: int = 10
    max_steps: int | None = None
    max_minutes: float | None = None
    learning_rate: float = 1e-4
    warmup: float = 0.015
    weight_decay: float = 0.0
    clip: float = 0.5
    batch_tokens: int = 4096
    accumulate: int = 2
    seed: int = 0
    gamma: int | None = None

    @property
    def measured_steps(self) -> int:
        """Draft steps of an evaluation."""
        return self.gamma or self.steps
