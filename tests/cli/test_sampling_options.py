"""`specplug generate`: every sampling option, and where the others come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import specplug.tiny
from specplug import SamplingParams
from specplug.cli import generate_run
from specplug.cli.sampling_options import make_params

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = ("--dtype", "float32", "--device", "cpu", "--quiet", "--allow-plugin", "none")
EVERY_OPTION = {
    "temperature": (("--temperature", "0.5"), 0.5),
    "top_k": (("--top-k", "7"), 7),
    "top_p": (("--top-p", "0.9"), 0.9),
    "min_p": (("--min-p", "0.05"), 0.05),
    "repetition_penalty": (("--repetition-penalty", "1.2"), 1.2),
    "presence_penalty": (("--presence-penalty", "0.3"), 0.3),
    "frequency_penalty": (("--frequency-penalty", "-0.4"), -0.4),
    "logit_bias": (("--logit-bias", '{"42": -5, "7": 1.5}'), {42: -5, 7: 1.5}),
    "bad_words": (("--bad-word", "self", "--bad-word", "os"), ("self", "os")),
    "allowed_token_ids": (("--allowed-token-id", "7", "--allowed-token-id", "0"), (7, 0)),
    "min_tokens": (("--min-tokens", "3"), 3),
    "max_tokens": (("--max-tokens", "9"), 9),
    "stop": (("--stop", "\n\n", "--stop", "x"), ("\n\n", "x")),
    "include_stop_str_in_output": (("--include-stop",), True),
    "stop_token_ids": (("--stop-token-id", "0", "--stop-token-id", "5"), (0, 5)),
    "ignore_eos": (("--ignore-eos",), True),
    "seed": (("--seed", "0"), 0),
    "n": (("--n", "2"), 2),
    "logprobs": (("--logprobs", "0"), 0),
    "prompt_logprobs": (("--prompt-logprobs", "2"), 2),
    "num_speculative_tokens": (("--num-speculative-tokens", "0"), 0),
    "skip_special_tokens": (("--keep-special-tokens",), False),
}


def params_of(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[SamplingParams]:
    """The sampling parameters that would be used."""
    seen: list[SamplingParams] = []
    original = generate_run._params
    monkeypatch.setattr(generate_run, "_params", lambda *args: seen.extend(original(*args)) or seen)
    monkeypatch.setattr(generate_run, "_run_all", lambda *args: None)
    monkeypatch.setattr(generate_run, "_stream", lambda *args: None)
    result = run("generate", *arguments)
    assert result.exit_code == 0, result.output
    return seen


def tiny_with(folder: Path, generation_config: str) -> str:
    """The embedded model with another generation_config.json."""
    for source in Path(specplug.tiny.__file__).parent.glob("*[!y]"):
        if source.is_file() and source.name != "generation_config.json":
            (folder / source.name).symlink_to(source)
    (folder / "generation_config.json").write_text(generation_config)
    return str(folder)


def test_every_sampling_parameter_has_an_option(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros are values too."""
    unsupported = {field.name for field in attrs.fields(SamplingParams)} - set(EVERY_OPTION)
    with_option = [name for name in unsupported if f"--{name.replace('_', '-')}" in run("generate", "-h").stdout]
    assert with_option == []
    arguments = [argument for given, _ in EVERY_OPTION.values() for argument in given]
    (params,) = params_of(run, monkeypatch, "tiny", "--prompt", "x", "--json", *BASE, *arguments)
    expected = SamplingParams(**{name: value for name, (_, value) in EVERY_OPTION.items()})
    assert attrs.asdict(params) == attrs.asdict(expected)
    assert unsupported == {
        "detokenize",
        "structured_outputs",
        "extra_args",
        "logprob_token_ids",
        "flat_logprobs",
        "spaces_between_special_tokens",
        "thinking_token_budget",
        "repetition_detection",
    }


def test_the_model_s_recommendations_are_the_defaults(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recommended = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 7}
    target = tiny_with(tmp_path, json.dumps(recommended))
    (params,) = params_of(run, monkeypatch, target, "--prompt", "x", *BASE, "--top-p", "0.5")
    assert params == SamplingParams(temperature=0.6, top_p=0.5, max_tokens=128)
    result = run("generate", target, "--prompt", "x", *(option for option in BASE if option != "--quiet"))
    assert "Sampling as the model's generation_config recommends: temperature=0.6, top_p=0.95" in result.stderr


@pytest.mark.parametrize(
    ("config", "temperature"), [({}, 0.0), ({"do_sample": False}, 0.0), ({"do_sample": True}, 1.0), ({"top_k": 5}, 0.0)]
)
def test_without_recommendations_it_is_greedy(
    config: dict[str, Any],
    temperature: float,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    target = tiny_with(tmp_path, json.dumps(config))
    (params,) = params_of(run, monkeypatch, target, "--prompt", "x", *BASE)
    assert params.temperature == temperature


def test_a_bad_recommendation_names_its_file(run: Callable[..., Any], tmp_path: Path) -> None:
    target = tiny_with(tmp_path, '{"top_p": 2}')
    result = run("generate", target, "--prompt", "x", *BASE)
    assert result.exit_code == 1
    assert "top_p=2: expected" in result.stderr
    assert "generation_config.json" in result.stderr
    assert run("generate", target, "--prompt", "x", "--top-p", "1", "--max-tokens", "2", *BASE).exit_code == 0


def test_layers_of_parameters() -> None:
    assert make_params({"top_k": 1, "n": 2}, {}, {"top_k": 3}) == SamplingParams(top_k=3, n=2)
