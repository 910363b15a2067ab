"""Every option is checked for its type; the message names the option, its value and what is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from specplug import LLM
from specplug.config.engine import EngineConfig
from specplug.config.vllm import translate_options
from specplug.contract.settings import SpeculativeConfig
from specplug.errors import ConfigurationError

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"denied_plugins": "ngram"}, "denied_plugins='ngram': expected a list of names, such as ['ngram']"),
    ({"denied_plugins": None}, "denied_plugins=None: expected a list of names"),
    ({"denied_plugins": [""]}, "denied_plugins=('',): expected a list of names"),
    ({"denied_plugins": [3]}, "denied_plugins=(3,): expected"),
    ({"allowed_plugins": "ngram"}, "allowed_plugins='ngram': expected a list of names, such as ['ngram'], or None"),
    ({"allowed_plugins": {"ngram": 1}}, "allowed_plugins={'ngram': 1}: expected"),
    ({"plugins": [1]}, "plugins=[1]: expected a mapping of method names to plugins"),
    ({"plugins": {1: print}}, "plugins={1: <built-in function print>}: expected a mapping of method names"),
    ({"plugins": None}, "plugins=None: expected a mapping"),
    ({"strict": "no"}, "strict='no': expected True or False"),
    ({"strict": 1}, "strict=1: expected True or False"),
    ({"trust_remote_code": "false"}, "trust_remote_code='false': expected True or False"),
    ({"skip_tokenizer_init": 0}, "skip_tokenizer_init=0: expected True or False"),
    ({"check_parity": None}, "check_parity=None: expected True or False"),
    ({"compile": 1}, "compile=1: expected 'auto', True or False"),
    ({"compile": np.ones(2)}, "compile=array([1., 1.]): expected 'auto'"),
    ({"seed": "a"}, "seed='a': expected a 64-bit integer"),
    ({"seed": None}, "seed=None: expected a 64-bit integer"),
    ({"seed": True}, "seed=True: expected a 64-bit integer"),
    ({"seed": 2**63}, "seed=9223372036854775808: expected a 64-bit integer"),
    ({"max_num_seqs": True}, "max_num_seqs=True: expected an integer of at least 1"),
    ({"max_num_seqs": None}, "max_num_seqs=None: expected an integer of at least 1"),
    ({"max_model_len": 12.0}, "max_model_len=12.0: expected an integer of at least 1, or None"),
    ({"block_size": np.array([4, 8])}, "block_size=array([4, 8]): expected an integer"),
    ({"chain_verification": ["block"]}, "chain_verification=['block']: expected 'block' or 'standard'"),
    ({"memory": 0.5}, "memory=0.5: expected a positive size"),
    ({"memory": "0.5"}, "memory='0.5': expected a size"),
    ({"memory": "9" * 400}, "expected a size"),
    ({"memory": float("nan")}, "memory=nan: expected a positive size"),
    ({"memory": float("inf")}, "memory=inf: expected a positive size"),
    ({"memory": [8]}, "memory=[8]: expected a size"),
    ({"dtype": 32}, "dtype=32: expected a text"),
    ({"dtype": None}, "dtype=None: expected a text"),
    ({"device": 0}, "device=0: expected a text"),
    ({"tokenizer": 5}, "tokenizer=5: expected a text, or None"),
    ({"revision": 5}, "revision=5: expected a text, or None"),
    ({"speculative_config": [("method", "ngram")]}, "speculative_config: expected a mapping, got [("),
    ({"speculative_config": {"method": ["ngram"]}}, "speculative_config needs 'method'"),
    ({"speculative_config": {"method": "x", 5: 1}}, "speculative_config: the key 5 is no text"),
    ({"speculative_config": {"method": "x", "num_speculative_tokens": True}}, "num_speculative_tokens=True: expected"),
    ({"speculative_config": {"method": "x", "num_speculative_tokens": 2.0}}, "num_speculative_tokens=2.0: expected"),
    (
        {"speculative_config": {"method": "x", "num_speculative_tokens": np.ones(2, int)}},
        "num_speculative_tokens=array([1, 1]): expected",
    ),
    (
        {"speculative_config": {"method": "x", "max_num_speculative_tokens": "8"}},
        "max_num_speculative_tokens='8': expected an integer of at least 1",
    ),
    ({"enable_prefix_caching": 0}, "enable_prefix_caching=0: expected True or False"),
    ({"speculative_config": {"method": "x", "fallback": "ngram"}}, "expected a mapping, got 'ngram'"),
]
WRONG_FOR_VLLM: list[tuple[dict[str, Any], str]] = [
    ({"data_parallel_size": True}, "data_parallel_size=True is not supported: replicas run on Ray Serve"),
    ({"pipeline_parallel_size": [1]}, "pipeline_parallel_size=[1] is not supported"),
    ({"fully_sharded_loras": 0}, "fully_sharded_loras=0 is not supported"),
    ({"enforce_eager": "no"}, "vLLM's option enforce_eager='no': expected True or False"),
    ({"disable_log_stats": np.ones(2)}, "vLLM's option disable_log_stats=array([1., 1.]): expected True or False"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_an_option_of_the_wrong_type_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        EngineConfig.create("tiny", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(("options", "message"), WRONG_FOR_VLLM, ids=[message[:60] for _, message in WRONG_FOR_VLLM])
def test_an_option_of_vllms_is_compared_with_its_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        translate_options(options)
    assert message in str(caught.value)


def test_a_models_name_is_no_number_and_a_progress_function_can_be_called() -> None:
    with pytest.raises(ConfigurationError, match="model=5: expected a text"):
        LLM(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="on_step=5: expected a function"):
        LLM("tiny", on_step=5)  # type: ignore[arg-type]


def test_values_of_other_libraries_are_taken_for_what_they_are() -> None:
    config = EngineConfig.create(
        Path("folder"),
        tokenizer=Path("other"),
        dtype=torch.float32,
        device=torch.device("cuda", 1),
        max_num_seqs=np.int64(4),
        block_size=torch.tensor(8),
        seed=np.uint8(3),
        memory=np.float32(4096),
        allowed_plugins=["ngram"],
        denied_plugins={"eagle"},
        speculative_config={"method": "x", "num_speculative_tokens": np.int32(3)},
    )
    assert (config.model, config.tokenizer, config.dtype, config.device) == ("folder", "other", "float32", "cuda:1")
    assert (config.max_num_seqs, config.block_size, config.seed, config.memory) == (4, 8, 3, 4096)
    assert {type(config.max_num_seqs), type(config.block_size), type(config.seed), type(config.memory)} == {int}
    assert (config.allowed_plugins, config.denied_plugins) == (("ngram",), ("eagle",))
    assert config.speculative is not None
    assert type(config.speculative.num_speculative_tokens) is int
    assert translate_options({"data_parallel_size": np.int64(1), "swap_space": 4.0, "enforce_eager": True}) == {}


def test_settings_of_a_plugin_take_numbers_of_other_libraries() -> None:
    @attrs.define
    class Settings:
        window: int
        _ratio: float = 0.5
        count: int = attrs.field(default=0, init=False)

    made = SpeculativeConfig("demo", 3, {"window": np.int64(3), "ratio": np.float32(0.25)}).settings(Settings)
    assert (made.window, type(made.window), made._ratio) == (3, int, 0.25)
    with pytest.raises(ConfigurationError, match="unknown key 'count'"):
        SpeculativeConfig("demo", 3, {"window": 3, "count": 4}).settings(Settings)
