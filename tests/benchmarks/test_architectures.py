"""Every causal language model of the installed Transformers is equal to `generate`, or refused with a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from architectures import all_cases, as_table, run_cases

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"


def outcomes_of(page: str) -> list[tuple[str, ...]]:
    """Type, layers and outcome of each row; reasons contain measured numbers."""
    return re.findall(r"^\| ([\w-]+) \| ([\w ,]+) \| (equal|refused|fault) \|", page, re.MULTILINE)


def test_the_page_says_of_every_type_what_becomes_of_it() -> None:
    rows = outcomes_of(PAGE.read_text())
    pages = {(name, pattern): outcome for name, patterns, outcome in rows for pattern in patterns.split(", ")}
    assert pages.keys() == set(all_cases([]))
    assert pages["qwen2_moe", "max_window_layers"] == "equal"  # windows in some layers
    assert pages["doge", "default"] == "refused"  # a mask of its own


@pytest.mark.slow
def test_nothing_but_equal_and_refused_occurs() -> None:
    outcomes = run_cases(all_cases([]))
    assert not [outcome for outcome in outcomes if outcome.outcome == "fault"]
    assert outcomes_of(as_table(outcomes)) == outcomes_of(PAGE.read_text())
