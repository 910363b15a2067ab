"""`LLM` as users call it: what goes in, what comes out, what is refused, and what is left behind."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from specplug import LLM, SamplingParams
from specplug.config.vllm import translate_options
from specplug.errors import CheckpointError, ConfigurationError, RequestError
from specplug.metrics import Counter, Gauge, Vector
from specplug.outputs import CompletionOutput, RequestMetrics, RequestOutput
from support.engines import assert_idle
from support.forks import said_by
from support.models import VOCABULARY
from support.speculators import Oracle, TokenSpeculator, TreeSpeculator, provide

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


# ---- prompts and parameters ---------------------------------------------------------------------------------------

FORMS: list[tuple[Any, list[tuple[str | None, list[int]]]]] = [
    ("w3. w4.", [("w3. w4.", [3, 4])]),
    ([3, 4], [(None, [3, 4])]),
    ((3, 4), [(None, [3, 4])]),
    (np.array([3, 4]), [(None, [3, 4])]),
    ([[np.int64(3), 4]], [(None, [3, 4])]),
    ({"prompt": "w3. w4."}, [("w3. w4.", [3, 4])]),
    ({"prompt": "w3. w4.", "prompt_token_ids": None}, [("w3. w4.", [3, 4])]),
    ({"prompt_token_ids": [3, 4]}, [(None, [3, 4])]),
    ({"prompt": "as shown", "prompt_token_ids": [3, 4]}, [("as shown", [3, 4])]),
    (["w5."], [("w5.", [5])]),
    (["w5.", [3, 4], {"prompt": "w6."}, (7,)], [("w5.", [5]), (None, [3, 4]), ("w6.", [6]), (None, [7])]),
    ((text for text in ("w5.", "w6.")), [("w5.", [5]), ("w6.", [6])]),
    (torch.tensor([3, 4]), [(None, [3, 4])]),
    ([], []),
]


@pytest.mark.parametrize("index", range(len(FORMS)))
def test_forms_of_prompts(words: LLM, index: int) -> None:
    prompts, expected = FORMS[index]
    outputs = words.generate(prompts, GREEDY)
    assert [(output.prompt, output.prompt_token_ids) for output in outputs] == expected
    alone = [words.generate([ids], GREEDY)[0].outputs[0].token_ids for _, ids in expected]
    assert [output.outputs[0].token_ids for output in outputs] == alone


WRONG: list[tuple[Any, str]] = [
    (None, "not NoneType"),
    (5, "not int"),
    (b"text", "not bytes"),
    ("", "the prompt is empty"),
    ([""], "the prompt is empty"),
    ([[]], "the prompt is empty"),
    (["w3.", None], "not NoneType"),
    ([3, "w3."], "not int"),
    ([1.5], "not float"),
    ([[1.5]], "token id 1.5 at position 0"),
    ([[3, True]], "token id True at position 1"),
    ([[3, "a"]], "token id 'a' at position 1"),
    ([["w3."]], "token id 'w3.' at position 0 is not an integer"),
    ([["w3.", "w4."]], "token id 'w3.' at position 0"),
    ([3, VOCABULARY], f"token id {VOCABULARY} at position 1 is outside the vocabulary of {VOCABULARY}"),
    ([3, -1], "token id -1 at position 1"),
    ([3] * 200, "the prompt has 200 tokens, the longest sequence is 160"),
    ({}, "'prompt' or 'prompt_token_ids'"),
    ({"text": "w3."}, "not 'text'"),
    ({"prompt": 5}, "'prompt' in a mapping is text, not int"),
    ({"prompt": None}, "not NoneType"),
    ({"prompt_token_ids": 5}, "a list of token ids, not int"),
    ({"prompt_token_ids": "w3."}, "a list of token ids, not str"),
]


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_wrong_prompts_are_refused_and_nothing_runs(words: LLM, index: int) -> None:
    prompts, message = WRONG[index]
    steps = words.engine.num_steps
    for given in [prompts, ["w3.", prompts]] if isinstance(prompts, dict) else [prompts]:
        with pytest.raises(RequestError) as caught:
            words.generate(given, GREEDY)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(RequestError):
        list(words.stream(prompts, GREEDY))
    assert_idle(words)
    assert words.engine.num_steps == steps


def test_one_bad_prompt_stops_all(words: LLM) -> None:
    steps = words.engine.num_steps
    with pytest.raises(RequestError, match="outside the vocabulary"):
        words.generate(["w3.", [5, 6], [VOCABULARY]], GREEDY)
    assert_idle(words)
    assert words.engine.num_steps == steps


def test_parameters_for_each_prompt(words: LLM) -> None:
    params = [attrs.evolve(GREEDY, max_tokens=count, n=n) for count, n in ((1, 1), (5, 2), (3, 1))]
    outputs = words.generate(["w3.", "w3.", "w4."], params)
    assert [[len(each.token_ids) for each in output.outputs] for output in outputs] == [[1], [5, 5], [3]]
    for wrong in ([], params[:2], [*params, GREEDY]):
        with pytest.raises(RequestError, match=f"{len(wrong)} sampling_params for 3 prompts"):
            words.generate(["w3.", "w3.", "w4."], wrong)


@pytest.mark.parametrize("wrong", [{"temperature": 0}, [{"temperature": 0}], "greedy", [None], 5])
def test_wrong_parameters_are_refused(words: LLM, wrong: Any) -> None:
    with pytest.raises(RequestError, match="SamplingParams"):
        words.generate(["w3."], wrong)
    assert_idle(words)


def test_the_last_seed_has_no_successor(words: LLM) -> None:
    """Completion i uses seed + i, which must not run out of seeds."""
    outputs = words.generate("w3.", SamplingParams(n=2, seed=2**63 - 1, max_tokens=4))[0].outputs
    assert [len(output.token_ids) for output in outputs] == [4, 4]


@pytest.mark.parametrize("name", ["mm_processor_kwargs", "tokenization_kwargs"])
def test_arguments_without_a_meaning_here(words: LLM, name: str) -> None:
    for call in (words.generate, words.chat):
        with pytest.raises(RequestError, match=f"{name} is not supported"):
            call("w3.", GREEDY, **{name: 1})  # type: ignore[operator]


def test_default_parameters(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "generation_config.json"
    with LLM(tmp_path, memory="32MiB", check_parity=False) as llm:
        for content, expected in [
            ({}, SamplingParams()),
            ({"do_sample": False}, SamplingParams(temperature=0)),
            ({"do_sample": True, "temperature": 0.3, "eos_token_id": 9}, SamplingParams(temperature=0.3)),
            (
                {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2, "max_new_tokens": 3},
                SamplingParams(top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2, max_tokens=3),
            ),
            ({"top_k": None, "temperature": None}, SamplingParams()),
        ]:
            config.write_text(json.dumps(content), encoding="utf-8")
            assert llm.get_default_sampling_params() == expected
        config.write_text('{"do_sample": false, "max_new_tokens": 3}', encoding="utf-8")
        assert llm.generate("w3.")[0].outputs == llm.generate("w3.", attrs.evolve(GREEDY, max_tokens=3))[0].outputs
        for damage in ("{", "[]", '{"top_p": 2}', '{"max_new_tokens": "many"}'):
            config.write_text(damage, encoding="utf-8")
            with pytest.raises(CheckpointError, match=r"generation_config\.json"):
                llm.generate("w3.")
        config.unlink()
        assert llm.get_default_sampling_params() == SamplingParams()


# ---- what comes out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["generate", "stream"])
def test_a_forked_process_gets_an_error_and_no_hang(words: LLM, use: str) -> None:
    stream = words.stream([[3, 4]], GREEDY)
    next(stream)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            words.generate([[3, 4]], GREEDY) if use == "generate" else next(stream)
        except RequestError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    said = said_by(child, read, write)
    assert f"the engine belongs to process {os.getpid()}, from which this one was forked" in said
    assert "start method 'spawn'" in said
    assert [piece.token_ids for piece in stream], "the engine goes on in the process that it belongs to"
    assert_idle(words)


def test_outputs(words: LLM) -> None:
    output = words.generate("w3. w4.", attrs.evolve(GREEDY, n=2))[0]
    assert isinstance(output, RequestOutput)
    assert (output.prompt, output.prompt_token_ids, output.finished) == ("w3. w4.", [3, 4], True)
    assert (output.prompt_logprobs, output.num_cached_tokens) == (None, 0)
    times = output.metrics
    assert isinstance(times, RequestMetrics)
    assert times.first_token_time is not None
    assert times.finished_time is not None
    assert times.arrival_time <= times.first_token_time <= times.finished_time
    for index, each in enumerate(output.outputs):
        assert isinstance(each, CompletionOutput)
        assert (each.index, each.finish_reason, each.stop_reason) == (index, "length", None)
        assert (each.logprobs, each.cumulative_logprob) == (None, None)
        assert "w3. w4." + each.text == words.get_tokenizer().decode([3, 4, *each.token_ids])
        assert each.finished()
        assert each.metrics is each.spec_decode_metrics
    numbers = [int(each.request_id) for each in words.generate(["w3.", "w4.", "w5."], GREEDY)]
    assert numbers == [int(output.request_id) + 1 + place for place in range(3)]


@pytest.mark.parametrize("kind", ["plain", "chain", "tree"])
def test_metrics_add_up(folder: Path, kind: str) -> None:
    choose = random.Random(0)
    prompts = [[choose.randrange(3, VOCABULARY) for _ in range(choose.randint(1, 9))] for _ in range(20)]
    oracle = Oracle([], VOCABULARY, 0.9)
    make: dict[str, Callable[[], Any]] = {
        "plain": dict,
        "chain": lambda: provide(lambda c, t: TokenSpeculator(oracle)),
        "tree": lambda: provide(lambda c, t: TreeSpeculator(oracle, (1,), 6)),
    }
    with LLM(folder, memory="32MiB", strict=True, **make[kind]()) as llm:
        free = llm.generate(prompts, attrs.evolve(GREEDY, max_tokens=20))
        oracle.known += [each.prompt_token_ids + each.outputs[0].token_ids for each in free]
        before = {metric.name: metric for metric in llm.get_metrics()}
        stop = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=list(range(0, 64, 6)))
        outputs = [output.outputs[0] for output in llm.generate(prompts, stop)]
        after = {metric.name: metric for metric in llm.get_metrics()}
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    spec = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    counters = ("num_preemptions", "prompt_tokens", "generation_tokens", *(f"spec_decode_{name}" for name in spec))
    vector = "vllm:spec_decode_num_accepted_tokens_per_pos"
    assert {name: type(metric) for name, metric in after.items()} == {
        **{f"vllm:{name}": Gauge for name in gauges},
        **{f"vllm:{name}": Counter for name in counters},
        **{f"vllm:prefix_cache_{name}": Counter for name in ("queries", "hits")},
        vector: Vector,
    }
    assert [after[f"vllm:{name}"].value for name in gauges] == [0, 0, 0]  # type: ignore[attr-defined]
    grown = {name: after[f"vllm:{name}"].value - before[f"vllm:{name}"].value for name in counters}  # type: ignore
    stats = [output.metrics for output in outputs]
    assert grown["num_preemptions"] == 0
    assert grown["prompt_tokens"] == sum(map(len, prompts))
    assert grown["generation_tokens"] == sum(len(output.token_ids) for output in outputs)
    assert grown["spec_decode_num_drafts"] == sum(each.num_spec_steps for each in stats)
    assert grown["spec_decode_num_draft_tokens"] == sum(each.num_draft_tokens for each in stats)
    assert grown["spec_decode_num_accepted_tokens"] == sum(each.num_accepted_draft_tokens for each in stats)
    assert sum(after[vector].values) == after["vllm:spec_decode_num_accepted_tokens"].value  # type: ignore
    assert after[vector].values == sorted(after[vector].values, reverse=True)  # type: ignore[attr-defined]
    cut = 0
    for output in outputs:
        each = output.metrics
        assert each.num_accepted_draft_tokens <= each.num_draft_tokens
        assert each.num_accepted_draft_tokens == sum(source is not None for source in output.token_sources)
        assert sum(each.acceptance_histogram) == each.num_spec_steps <= each.num_steps
        missing = each.num_accepted_draft_tokens + each.num_steps - len(output.token_ids)
        assert missing == (output.token_sources[-1] is not None)  # it ended with a drafted token: no bonus
        cut += missing
    assert (cut > 3) == (kind != "plain")


# ---- vLLM's options -----------------------------------------------------------------------------------------------


def test_options_of_vllm() -> None:
    harmless = {
        "runner": "generate",
        "data_parallel_size": 1,
        "enforce_eager": True,
        "swap_space": 4,
        "load_format": "safetensors",
    }
    assert translate_options({**harmless, "max_num_seqs": 3, "dtype": "float32"}) == {
        "max_num_seqs": 3,
        "dtype": "float32",
    }
    for name, value, reason in [
        ("pipeline_parallel_size", 2, "tensor_parallel_size"),
        ("quantization", "awq", "expected 'int8'"),
        ("max_cpu_loras", 2, "adapters are kept where the target is"),
        ("kv_cache_dtype", "fp8", "model's dtype"),
        ("load_format", "gguf", "safetensors"),
        ("hf_overrides", {"a": 1}, "no counterpart"),
        ("tokenizer_mode", "slow", "no counterpart"),
        ("kv_cache_memory_bytes", 1 << 30, "give memory"),
    ]:
        with pytest.raises(ConfigurationError, match=f"{name}.*{reason}"):
            LLM("tiny", **{name: value})
    with pytest.raises(ConfigurationError, match="no option 'max_num_seq'; did you mean 'max_num_seqs'"):
        LLM("tiny", max_num_seq=3)


@pytest.mark.parametrize("options", [{"kv_cache_memory_bytes": None}, {"gpu_memory_utilization": 0.9}])
def test_memory_options_of_vllm(options: dict[str, Any]) -> None:
    if None in options.values():
        assert translate_options(options) == {}
        return
    with pytest.raises(ConfigurationError, match="give memory"):
        translate_options(options)
