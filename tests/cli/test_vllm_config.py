"""`specplug vllm-config`: vLLM's own method where it is the same, the adapter for every other."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import pytest

from specplug_vllm.configuration import DEFAULT_TOKENS, NATIVE

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

CLASS = "specplug_vllm.SpecplugProposer"
HEAD = {"model": "some/head", "revision": "v1"}
EQUAL = {
    "ngram": {"prompt_lookup_max": 4, "prompt_lookup_min": 2},
    "draft_model": HEAD,
    "eagle": HEAD,
    "eagle3": {**HEAD, "draft_sample_method": "probabilistic"},
    "suffix": {"suffix_decoding_max_tree_depth": 12},
}
"""Keys that specplug's method and vLLM's have both."""
OTHER = {
    "draft_model": {"draft_dtype": "float32"},
    "eagle": {"tree_total_tokens": 12},
    "eagle3": {"tree_total_tokens": 12},
    "suffix": {"some_key_of_the_plugin": 1},
    "ngram": {"some_key_of_the_plugin": 1},
}
"""Keys that vLLM does not have."""


@pytest.fixture
def printed(run: Callable[..., Result], installed: Callable[..., None]) -> Callable[..., Any]:
    """The object that the command prints; the integration is installed."""
    installed("specplug-vllm", methods={"vllm": "specplug_vllm.configuration"}, group="specplug.integrations")

    def printed(config: dict[str, Any], *options: str) -> Any:
        result = run("vllm-config", json.dumps(config), "--json", *options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return printed


def test_every_method_of_vllm_is_covered() -> None:
    assert EQUAL.keys() == OTHER.keys() == NATIVE.keys()


@pytest.mark.parametrize("method", EQUAL)
def test_vllms_own_method(method: str, printed: Callable[..., Any]) -> None:
    config = {"method": method, "num_speculative_tokens": 7, **EQUAL[method]}
    assert printed(config)["arguments"] == {"speculative_config": config}


@pytest.mark.parametrize("method", EQUAL)
def test_the_adapter_where_it_is_asked_for(method: str, printed: Callable[..., Any]) -> None:
    config = {"method": method, "num_speculative_tokens": 7, **EQUAL[method]}
    assert printed(config, "--adapter")["arguments"] == {
        "speculative_config": {"method": "custom_class", "model": CLASS, "num_speculative_tokens": 7},
        "additional_config": {"specplug": {"method": method, **EQUAL[method]}},
        **({"worker_cls": "specplug_vllm.Worker"} if method.startswith("eagle") else {}),
    }


@pytest.mark.parametrize("method", OTHER)
def test_the_adapter_where_vllm_lacks_a_key(method: str, printed: Callable[..., Any]) -> None:
    shown = printed({"method": method, "num_speculative_tokens": 4, **EQUAL[method], **OTHER[method]})
    assert shown["arguments"]["speculative_config"]["method"] == "custom_class"
    assert shown["arguments"]["additional_config"] == {"specplug": {"method": method, **EQUAL[method], **OTHER[method]}}
    assert shown["notes"] == [f"vLLM's own {method} has no key '{next(iter(OTHER[method]))}', so the plugin runs"]


def test_a_head_that_is_not_named_is_the_plugins(printed: Callable[..., Any]) -> None:
    shown = printed({"method": "eagle3", "num_speculative_tokens": 4})
    assert shown["arguments"]["speculative_config"]["method"] == "custom_class"


def test_every_other_method_and_its_fallback(printed: Callable[..., Any]) -> None:
    config = {"method": "last_seen", "window": 3, "fallback": {"method": "ngram", "prompt_lookup_max": 3}}
    shown = printed({**config, "num_speculative_tokens": "auto", "max_num_speculative_tokens": 6})
    assert shown["arguments"] == {
        "speculative_config": {"method": "custom_class", "model": CLASS, "num_speculative_tokens": 6},
        "additional_config": {"specplug": config},
    }
    assert "vLLM does not choose their length" in shown["notes"][0]
    assert printed(config)["arguments"]["speculative_config"]["num_speculative_tokens"] == DEFAULT_TOKENS


def test_the_worker_that_delivers_target_states(printed: Callable[..., Any]) -> None:
    shown = printed({"method": "ngram", "num_speculative_tokens": 3}, "--worker")["arguments"]
    assert shown["worker_cls"] == "specplug_vllm.Worker"
    assert shown["speculative_config"]["method"] == "custom_class"
    eagle3 = {"method": "eagle3", "model": "head", "num_speculative_tokens": 3}
    assert "worker_cls" not in printed(eagle3)["arguments"]
    for config in ({**eagle3, "fallback": {"method": "ngram"}}, {"method": "mine", "fallback": eagle3}):
        assert printed(config)["arguments"]["worker_cls"] == "specplug_vllm.Worker"


def test_options_for_a_shell(run: Callable[..., Result], printed: Callable[..., Any]) -> None:
    config = {"method": "last_seen", "text": "it's $HOME"}
    result = run("vllm-config", json.dumps(config))
    words = shlex.split(result.stdout)
    assert words[::2] == ["--speculative-config", "--additional-config"]
    assert {"speculative_config": json.loads(words[1]), "additional_config": json.loads(words[3])} == printed(config)[
        "arguments"
    ]
    assert result.stderr.startswith("specplug: note: drafts have 5 tokens")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "the speculative configuration is not JSON"),
        ("[]", "speculative_config"),
        ("{}", "method"),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "num_speculative_tokens"),
    ],
)
def test_what_is_wrong_is_said(
    run: Callable[..., Result], printed: Callable[..., Any], given: str, message: str
) -> None:
    result = run("vllm-config", given)
    assert result.exit_code == 1
    assert message in result.stderr


def test_an_integration_for_another_core(run: Callable[..., Result], installed: Callable[..., None]) -> None:
    installed(
        "specplug-vllm",
        methods={"vllm": "specplug_vllm.configuration"},
        group="specplug.integrations",
        requires="specplug>=9",
    )
    result = run("vllm-config", '{"method": "ngram"}')
    assert result.exit_code == 1
    assert "specplug-vllm 1.2 cannot be used: needs specplug>=9" in result.stderr
