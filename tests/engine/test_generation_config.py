"""What a model's generation_config.json asks for is done, named in one warning, or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specplug import LLM, SamplingParams
from specplug.errors import CheckpointError
from specplug.sampling.defaults import default_sampling_params, eos_ids, read_generation_config, recommended_options
from support.models import VOCABULARY, save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path, "llama")


def write(folder: Path, **content: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")


def greedy(folder: Path, prompt: list[int]) -> list[int]:
    """What `generate` gives with the folder's generation_config."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    return list(model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0)[0, len(prompt) :].tolist())


def test_what_is_taken_gives_the_tokens_of_generate(folder: Path) -> None:
    plain = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 2}
    write(folder, **plain)
    prompt = [5, 9, 17, 5, 9]
    with LLM(folder, skip_tokenizer_init=True, memory="32MiB", dtype="float32", check_parity=False) as llm:

        def own() -> list[int]:
            return llm.generate([prompt])[0].outputs[0].token_ids

        free = own()
        assert free == greedy(folder, prompt)
        for changes in (
            {"suppress_tokens": [free[0], free[2]]},
            {"bad_words_ids": [[free[1]], free[3:5]]},
            {"repetition_penalty": 1.8},
            {"eos_token_id": [free[3], 2]},
            {"eos_token_id": free[0], "min_new_tokens": 6},
            {
                "suppress_tokens": [free[0]],
                "bad_words_ids": [[free[1]]],
                "repetition_penalty": 1.3,
                "min_new_tokens": 9,
            },
        ):
            write(folder, **{**plain, **changes})
            with LLM(folder, skip_tokenizer_init=True, memory="32MiB", dtype="float32", check_parity=False) as changed:
                tokens = changed.generate([prompt])[0].outputs[0].token_ids
            assert tokens == greedy(folder, prompt), changes
            assert tokens != free


def test_parameters_that_are_given_take_nothing_over_but_the_end(folder: Path) -> None:
    """As in vLLM; whoever wants the model's own starts from `get_default_sampling_params`."""
    write(folder, repetition_penalty=1.8, suppress_tokens=[5], eos_token_id=7)
    params = SamplingParams(temperature=0, max_tokens=20)
    with LLM(folder, skip_tokenizer_init=True, memory="32MiB", dtype="float32", check_parity=False) as llm:
        given = llm.generate([[5, 9]], params)[0].outputs[0].token_ids
        forced = llm.generate([[5, 9]], SamplingParams(temperature=0, max_tokens=20, allowed_token_ids=[7]))
        assert forced[0].outputs[0].token_ids == [7]
    write(folder, eos_token_id=7)
    with LLM(folder, skip_tokenizer_init=True, memory="32MiB", dtype="float32", check_parity=False) as llm:
        assert llm.generate([[5, 9]], params)[0].outputs[0].token_ids == given


def test_one_warning_names_what_is_not_done(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder, forced_eos_token_id=3, no_repeat_ngram_size=2, num_beams=1, typical_p=1.0, min_length=0)
    with caplog.at_level(logging.WARNING, logger="specplug"):
        for _ in range(3):
            default_sampling_params(str(folder))
    (record,) = caplog.records
    assert "forced_eos_token_id, no_repeat_ngram_size" in record.getMessage()
    assert "num_beams" not in record.getMessage()


def test_lengths_that_do_not_fit_together_yield(folder: Path) -> None:
    write(folder, min_new_tokens=40)
    assert (default_sampling_params(str(folder)).min_tokens, default_sampling_params(str(folder)).max_tokens) == (
        40,
        40,
    )
    write(folder, min_new_tokens=40, max_new_tokens=30)
    assert recommended_options(str(folder))["min_tokens"] == 30
    write(folder, max_new_tokens=0)
    assert default_sampling_params(str(folder)).max_tokens == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"suppress_tokens": ["5"]}, "suppress_tokens="),
        ({"suppress_tokens": [-1]}, "suppress_tokens="),
        ({"bad_words_ids": [5]}, "bad_words_ids="),
        ({"bad_words_ids": [[]]}, "bad_words_ids="),
        ({"min_new_tokens": "5"}, "min_new_tokens='5': expected an integer"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3: expected"),
        ({"temperature": "0.7"}, "temperature='0.7'"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"do_sample": "false"}, "do_sample='false': expected true or false"),
        ({"stop_strings": [3]}, "stop_strings="),
    ],
)
def test_malformed_fields_are_refused_by_their_name(folder: Path, content: dict[str, Any], message: str) -> None:
    write(folder, **content)
    with pytest.raises(CheckpointError) as caught:
        default_sampling_params(str(folder))
    assert "generation_config.json: " + message in str(caught.value)


@pytest.mark.parametrize("value", ["2", ["2"], [2, "x"], 2.0, True, [[2]], {"a": 1}])
def test_an_end_that_is_no_id_is_refused_before_weights_are_read(folder: Path, value: Any) -> None:
    write(folder, eos_token_id=value)
    for weights in folder.glob("*.safetensors"):
        content = weights.read_bytes()
        weights.write_bytes(content[:-64] + bytes(64))
    steps: list[int] = []
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id=.* expected a token id"):
        LLM(folder, skip_tokenizer_init=True, memory="32MiB", on_step=lambda report: steps.append(report.number))
    assert set(steps) == {1}


def test_ends_outside_the_vocabulary_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They end nothing in Transformers either; `min_tokens` must not take them for places in the logits."""
    write(folder, eos_token_id=[-1, 2, VOCABULARY, 50256])
    with caplog.at_level(logging.WARNING, logger="specplug"):
        assert eos_ids(folder, None, VOCABULARY) == {2}
    assert f"-1, {VOCABULARY}, 50256, outside the vocabulary of {VOCABULARY}" in caplog.text
    with LLM(folder, skip_tokenizer_init=True, memory="32MiB", check_parity=False) as llm:
        params = SamplingParams(temperature=0, max_tokens=3, min_tokens=3, allowed_token_ids=[VOCABULARY - 1])
        assert llm.generate([[5]], params)[0].outputs[0].token_ids == [VOCABULARY - 1] * 3


def test_a_file_that_is_no_object_is_damaged(folder: Path) -> None:
    for damage in ("{", "[]", "3"):
        (folder / "generation_config.json").write_text(damage, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"generation_config\.json is damaged"):
            read_generation_config(folder)
