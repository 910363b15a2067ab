"""Every causal language model of the installed Transformers is equal to `generate`, or refused with a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from architectures import all_cases, as_table, run_cases
from tiny_configs import tiny_config

from specplug.errors import UnsupportedModelError
from specplug.model.architecture.inspection import inspect_architecture

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"


def outcomes_of(page: str) -> list[tuple[str, ...]]:
    """Type, layers, outcome and reason of each row; without the numbers, which are measured."""
    rows = re.findall(r"^\| ([\w-]+) \| ([\w ,]+) \| (equal|refused|fault) \| (.*) \|$", page, re.MULTILINE)
    return [(*row, re.sub(r"difference [\d.e-]+", "difference", reason)) for *row, reason in rows]


def test_the_page_says_of_every_type_what_becomes_of_it() -> None:
    rows = outcomes_of(PAGE.read_text())
    pages = {(name, pattern): outcome for name, patterns, outcome, _ in rows for pattern in patterns.split(", ")}
    assert pages.keys() == set(all_cases([]))
    assert pages["qwen2_moe", "max_window_layers"] == "equal"  # windows in some layers
    assert pages["doge", "default"] == "refused"  # a mask of its own


@pytest.mark.parametrize("name", ["falcon", "roberta", "diffllama", "doge"])
def test_the_page_gives_the_reason_of_a_refusal_as_it_is_today(name: str) -> None:
    [reason] = {
        reason for row, _, outcome, reason in outcomes_of(PAGE.read_text()) if (row, outcome) == (name, "refused")
    }
    with pytest.raises(UnsupportedModelError) as caught:
        inspect_architecture(tiny_config(name), torch.float32)
    assert reason == str(caught.value)


@pytest.mark.slow
def test_nothing_but_equal_and_refused_occurs() -> None:
    outcomes = run_cases(all_cases([]))
    assert not [outcome for outcome in outcomes if outcome.outcome == "fault"]
    assert outcomes_of(as_table(outcomes)) == outcomes_of(PAGE.read_text())
