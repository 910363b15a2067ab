"""Whether a head fits a target."""

from __future__ import annotations

from typing import Protocol

from specplug import ConfigurationError
from specplug_eagle.head.spec import HeadSpec


class TargetFacts(Protocol):
    """The properties of the target that are needed; `specplug.TargetModel` has them."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer."""
        ...

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        ...


def validate(spec: HeadSpec, target: TargetFacts) -> None:
    """Checks that a head was made for a target like this one; layer ids are checked by `resolve_layer_ids`.

    Raises:
        ConfigurationError: another hidden size or vocabulary; both values are named.
    """
    if spec.target_hidden_size != target.hidden_size:
        raise ConfigurationError(
            f"the draft head reads target states of hidden size {spec.target_hidden_size}, but the target's is "
            f"{target.hidden_size}; it was made for another target"
        )
    if spec.vocab_size != target.vocab_size:
        raise ConfigurationError(
            f"the draft head has a vocabulary of {spec.vocab_size} tokens, but the target's has {target.vocab_size}; it was "
            "made for another target"
        )
    for held, name in ((spec.has_own_embedding, "embed_tokens"), (spec.has_own_lm_head, "lm_head")):
        if not held and spec.hidden_size != target.hidden_size:
            raise ConfigurationError(
                f"the draft head holds no {name}, and cannot borrow the target's: its hidden size is {spec.hidden_size}, the "
                f"target's {target.hidden_size}"
            )
