"""The trainer's view of a target is the model's own, on every architecture of the engine's list."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from specplug_eagle.train.build import boundaries_of, head_spec, new_head
from specplug_eagle.train.options import HeadOptions
from specplug_eagle.train.target import Target
from support.models import ARCHITECTURES, make_config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_logits_are_those_of_the_models_forward(architecture: str) -> None:
    torch.manual_seed(0)
    target = Target(AutoModelForCausalLM.from_config(make_config(architecture)), None, architecture)
    layers = target.num_layers
    ids = torch.randint(3, target.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    states = target.states(ids, (0, 1, layers))
    with torch.no_grad():
        whole = target.model(ids, output_hidden_states=True)
        assert torch.allclose(states.final, whole.hidden_states[-1], atol=1e-5)
        logits = target.logits(states.final.flatten(0, 1)).unflatten(0, (2, 9))
    assert torch.allclose(logits, whole.logits, atol=1e-5)
    entered = states.features.split(target.hidden_size, dim=-1)
    for boundary in (0, 1):
        assert torch.equal(entered[boundary], whole.hidden_states[boundary])
    assert not torch.allclose(entered[2], states.final)  # before the final norm


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
def test_a_head_fits_any_of_them(architecture: str) -> None:
    target = Target(AutoModelForCausalLM.from_config(make_config(architecture)), None, architecture)
    options = HeadOptions(layer_ids=(0, 1, 3), lm_head="borrow")
    spec = head_spec(options, target)
    head = new_head(spec, options, target, None, 0)
    assert boundaries_of(spec, target) == (0, 1, 3)
    assert head.logits(torch.zeros(2, target.hidden_size)).shape == (2, target.vocab_size)


def test_the_fingerprint_tells_targets_apart() -> None:
    torch.manual_seed(0)
    one, other = (Target(AutoModelForCausalLM.from_config(make_config("llama")), None, "") for _ in range(2))
    assert one.fingerprint() == one.fingerprint() != other.fingerprint()
