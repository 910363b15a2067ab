"""The counterparts of methods in Transformers: plugins name them, and core knows none."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from specplug import hookimpl
from specplug.bench.peers import (
    TransformersContestant,
    TransformersModel,
    transformers_contestants,
    transformers_options,
)
from specplug.plugins.registry import PluginRegistry


def options(config: dict[str, Any], **plugin: Any) -> dict[str, Any] | None:
    """The counterpart of a configuration of a plugin `mine` with these attributes."""

    @hookimpl
    def load_speculator(config: Any, target: Any) -> None:
        """Never called."""

    module = ModuleType("mine")
    vars(module).update(load_speculator=load_speculator, **plugin)
    return transformers_options({"method": "mine", **config}, PluginRegistry(provided={"mine": module}))


def lookup(config: Any) -> dict[str, Any] | None:
    return {"prompt_lookup_num_tokens": config.num_speculative_tokens} if config.get("longest", 1) else None


def test_the_plugin_names_the_counterpart() -> None:
    assert options({"num_speculative_tokens": 3}, transformers_options=lookup) == {"prompt_lookup_num_tokens": 3}


def test_a_method_that_chooses_its_lengths_is_compared_with_a_fixed_length() -> None:
    assert options({}, transformers_options=lookup) == {"prompt_lookup_num_tokens": 5}


@pytest.mark.parametrize("config", [{"longest": 0}, {"fallback": {"method": "mine"}}])
def test_no_counterpart(config: dict[str, Any]) -> None:
    assert options(config, transformers_options=lookup) is None
    assert options({}) is None


def test_counterparts_of_the_shipped_methods() -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2}
    draft = {"method": "draft_model", "num_speculative_tokens": 3}
    found = transformers_contestants("tiny", [ngram, draft, dict(ngram), {**draft, "num_speculative_tokens": 6}], {})
    assert [contestant.label for contestant in found] == [
        "transformers generate",
        "transformers prompt lookup",
        "transformers assisted generation 3 tokens",
        "transformers assisted generation 6 tokens",
    ]
    assert found[1].options == {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}
    assert (Path(found[2].options["assistant_model"]) / "config.json").is_file()


def test_a_mode_without_a_name_of_its_own() -> None:
    contestant = TransformersContestant(TransformersModel("tiny", {}), {"method": "mine"}, {"num_beams": 2})
    assert contestant.label == "transformers generate with num_beams"
