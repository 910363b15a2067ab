"""LoRA adapters: each row of a batch equals a model with its adapter merged, whatever drafts, forks, is cached or preempted."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, CheckpointError, ConfigurationError, LoRARequest, RequestError, SamplingParams
from specplug.config.engine import EngineConfig
from specplug.engine.planning import plan_engine
from specplug.model.kv_cache import BlockTable
from specplug.model.rows import ForwardRow
from support.adapters import ALL_LINEARS, merge_adapter, save_adapter
from support.drafting import options_of, perturbed_copy
from support.engines import assert_idle, squeeze_blocks
from support.heads import save_eagle3
from support.models import VOCABULARY, save_model
from support.reference import MARGIN, generate

NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
NAMES = (None, "all", "attention", "patterns")
SPECULATORS = ("plain", "ngram", "draft_model", "eagle3", "eagle3 tree", "tree")
COMMON: dict[str, Any] = {"skip_tokenizer_init": True, "strict": True, "check_parity": False, "memory": "64MiB"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, three adapters of different ranks, layers and scales, and what drafts."""
    root = tmp_path_factory.mktemp("lora")
    target = save_model(root / "target", "llama", eos_token_id=None, intermediate_size=64)
    patterns = {"rank_pattern": {"o_proj": 5}, "alpha_pattern": {"up_proj": 24}, "use_rslora": True}
    save_adapter(root / "all", target, seed=1)
    save_adapter(root / "attention", target, seed=2, rank=3, modules=("q_proj", "v_proj"), size=0.6)
    save_adapter(root / "patterns", target, seed=3, rank=2, modules=("o_proj", "up_proj"), size=0.5, **patterns)
    return {
        "root": root,
        "target": target,
        **{name: root / name for name in NAMES if name},
        "draft": perturbed_copy(target, root / "draft", 0.05),
        "head": save_eagle3(root / "head"),
    }


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> list[tuple[list[int], dict[str | None, list[int]]]]:
    """Prompts with what Transformers generates from the target and from each merged model."""
    merged = {
        name: merge_adapter(models["root"] / f"merged {name}", models["target"], models[name])
        if name
        else models["target"]
        for name in NAMES
    }
    chooser, found = random.Random(0), []
    trunk = [chooser.randrange(3, VOCABULARY) for _ in range(24)]  # prompts that begin alike
    while len(found) < 5:
        tail = [chooser.randrange(3, VOCABULARY) for _ in range(chooser.randint(1, 12))]
        prompt = [*trunk[: chooser.choice([0, 8, 17, 24])], *tail]
        outputs = {name: generate(folder, prompt, NEW_TOKENS) for name, folder in merged.items()}
        if all(margin > MARGIN for _, margin in outputs.values()):
            found.append((prompt, {name: output for name, (output, _) in outputs.items()}))
    assert all(len({tuple(output) for output in outputs.values()}) == len(NAMES) for _, outputs in found)
    return found


def modules(models: dict[str, Path]) -> dict[str, Path]:
    return {name: models[name] for name in NAMES if name}


@pytest.mark.parametrize(
    ("speculator", "native"), [*((speculator, True) for speculator in SPECULATORS), ("tree", False)]
)
def test_rows_equal_models_with_merged_weights(
    models: dict[str, Path],
    expected: list[tuple[list[int], dict[str | None, list[int]]]],
    speculator: str,
    native: bool,
) -> None:
    """Mixed batches in a tight engine: chunks, preemption, prefixes that rows of other adapters have too. Twice."""
    todo = [(prompt, name, outputs[name]) for prompt, outputs in expected for name in NAMES]
    random.Random(1).shuffle(todo)
    prompts, names, results = ([each[index] for each in todo] for index in range(3))
    known = [prompt + output for prompt, _, output in todo]
    tight = {"max_num_seqs": 5, "max_num_batched_tokens": 41, "block_size": 4, "max_model_len": 140}
    options = options_of(speculator, models, known)
    with LLM(models["target"], lora_modules=modules(models), **COMMON, **tight, **options) as llm:
        squeeze_blocks(llm, 28)
        assert llm.engine.runner.adapters is not None
        for linear in llm.engine.runner.adapters.linears:
            linear._is_native &= native  # else PyTorch's operations
        for turn in (1, -1):
            outputs = llm.generate(prompts[::turn], GREEDY, use_tqdm=False, lora_request=names[::turn])
            assert [output.outputs[0].token_ids for output in outputs] == results[::turn]
            assert [output.lora_request and output.lora_request.lora_name for output in outputs] == names[::turn]
        assert llm.engine.scheduler.num_preemptions > 0
        assert llm.engine.prefix_cache is not None
        assert llm.engine.prefix_cache.num_hit_tokens > 100
        assert llm.engine.stats.num_accepted_draft_tokens >= {"draft_model": 10, "tree": 50}.get(speculator, 0)
        assert_idle(llm)


@pytest.mark.parametrize("speculator", ["plain", "draft_model", "tree"])
def test_sampled_and_forked_rows_do_not_depend_on_the_batch(
    models: dict[str, Path], expected: list[tuple[list[int], dict[str | None, list[int]]]], speculator: str
) -> None:
    jobs = [(prompt, name) for prompt, _ in expected[:2] for name in NAMES]
    params = [SamplingParams(temperature=0.9, seed=number, n=2, max_tokens=7) for number in range(len(jobs))]
    prompts, names = [prompt for prompt, _ in jobs], [name for _, name in jobs]

    def ids(outputs: Any) -> list[list[list[int]]]:
        return [[each.token_ids for each in output.outputs] for output in outputs]

    with LLM(models["target"], lora_modules=modules(models), enable_prefix_caching=False, **COMMON) as llm:
        alone = [
            ids(llm.generate([prompt], param, use_tqdm=False, lora_request=name))[0]
            for (prompt, name), param in zip(jobs, params, strict=True)
        ]
    options = options_of(speculator, models, [])
    tight = {"max_num_seqs": 5, "max_num_batched_tokens": 41, "block_size": 4, "max_model_len": 140}
    with LLM(models["target"], lora_modules=modules(models), **COMMON, **tight, **options) as llm:
        squeeze_blocks(llm, 28)
        assert ids(llm.generate(prompts, params, use_tqdm=False, lora_request=names)) == alone
        assert ids(llm.generate(prompts, params, use_tqdm=False, lora_request=names)) == alone
        assert_idle(llm)


@pytest.fixture(scope="module")
def llm(models: dict[str, Path]) -> Iterator[LLM]:
    with LLM(models["target"], enable_lora=True, max_loras=2, block_size=4, **COMMON) as llm:
        yield llm


@pytest.fixture
def empty(llm: LLM) -> LLM:
    """The engine without adapters."""
    for number in llm.list_loras():
        llm.remove_lora(number)
    return llm


def test_loaded_by_requests_and_by_hand(
    empty: LLM, models: dict[str, Path], expected: list[tuple[list[int], dict[str | None, list[int]]]]
) -> None:
    prompt, outputs = expected[0]

    def run(wanted: Any) -> list[int]:
        return empty.generate([prompt], GREEDY, use_tqdm=False, lora_request=wanted)[0].outputs[0].token_ids

    requests = {name: LoRARequest(name, 10 + index, models[name]) for index, name in enumerate(NAMES) if name}
    assert run(None) == outputs[None]
    for name, request in [*requests.items(), *requests.items()]:  # three in turn through two slots: the oldest goes
        assert run(request) == outputs[name]
        assert len(empty.lora_requests) <= 2
    assert run("patterns") == outputs["patterns"]  # by its name, now that it is loaded
    for number in empty.list_loras():
        assert empty.remove_lora(number)
        assert not empty.remove_lora(number)
    with pytest.raises(RequestError, match=r"no adapter 'patterns' is loaded \(loaded: none\)"):
        run("patterns")
    assert empty.add_lora(requests["all"])
    assert empty.add_lora(requests["attention"])
    with pytest.raises(
        RequestError, match="no room for the adapter 'patterns': max_loras=2, and all are loaded or in use"
    ):
        run(requests["patterns"])
    assert run("all") == outputs["all"]
    assert [each.lora_name for each in empty.lora_requests] == ["all", "attention"]


def test_another_load_of_a_name_never_finds_the_blocks_of_the_first(
    empty: LLM, models: dict[str, Path], expected: list[tuple[list[int], dict[str | None, list[int]]]]
) -> None:
    prompt, outputs = max(expected, key=lambda pair: len(pair[0]))
    for _ in range(2):
        for name in ("all", "attention", "patterns"):
            empty.add_lora(LoRARequest("name", 1, models[name]))
            first, second = (empty.generate([prompt], GREEDY, use_tqdm=False, lora_request="name")[0] for _ in range(2))
            assert first.outputs[0].token_ids == second.outputs[0].token_ids == outputs[name]
            assert (first.num_cached_tokens, second.num_cached_tokens > 0) == (0, True)
            assert empty.remove_lora(1)


def test_an_adapter_in_use_is_not_freed_under_its_rows(
    empty: LLM, models: dict[str, Path], expected: list[tuple[list[int], dict[str | None, list[int]]]]
) -> None:
    prompt, outputs = expected[1]
    empty.add_lora(LoRARequest("all", 1, models["all"]))
    empty.add_lora(LoRARequest("attention", 2, models["attention"]))
    pieces = empty.stream([prompt], GREEDY, lora_request="all")
    ids = list(next(pieces).token_ids)
    assert empty.remove_lora(1)  # its row runs
    with pytest.raises(RequestError, match="no adapter 'all' is loaded"):
        empty.generate([prompt], GREEDY, lora_request="all")
    with pytest.raises(RequestError, match="no room for the adapter 'patterns'"):
        empty.add_lora(LoRARequest("patterns", 3, models["patterns"]))
    ids += [token for piece in pieces for token in piece.token_ids]
    assert ids == outputs["all"]
    empty.add_lora(LoRARequest("patterns", 3, models["patterns"]))
    answer = empty.generate([prompt], GREEDY, use_tqdm=False, lora_request="patterns")[0]
    assert answer.outputs[0].token_ids == outputs["patterns"]


def test_threads_that_load_and_unload(
    empty: LLM, models: dict[str, Path], expected: list[tuple[list[int], dict[str | None, list[int]]]]
) -> None:
    wrong: list[Any] = []

    def work(name: str, number: int) -> None:
        for turn in range(6):
            prompt, outputs = expected[turn % len(expected)]
            try:
                wanted = LoRARequest(name, number, models[name])
                answer = empty.generate([prompt], GREEDY, use_tqdm=False, lora_request=wanted)[0].outputs[0].token_ids
                if answer != outputs[name]:
                    wrong.append((name, answer, outputs[name]))
                if turn % 2:
                    empty.remove_lora(number)
            except RequestError as error:
                if "no room" not in str(error):
                    wrong.append(error)

    threads = [
        threading.Thread(target=work, args=(name, number))
        for name, number in [("all", 1), ("attention", 2), ("patterns", 3), ("all", 1)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_idle(empty)


def test_a_batch_without_adapters_runs_the_targets_own_layers(
    empty: LLM, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = empty.engine.runner
    assert runner.adapters is not None
    empty.add_lora(LoRARequest("attention", 1, models["attention"]))
    slot = next(s for s in range(2) if runner.adapters.linears[0].slot_ranks[s] == 3)
    attached: list[Any] = []
    kind = type(runner.adapters.linears[0])
    monkeypatch.setattr(kind, "attach", lambda self, segments: attached.append(self))
    table = BlockTable(4)
    table.extend([0])
    runner.forward([ForwardRow([5, 6], 0, table)])
    assert not attached
    runner.forward([ForwardRow([5, 6], 0, table, adapter=slot)])
    assert len(attached) == 2 * 3  # q_proj and v_proj of three layers, and no others
    assert not any("forward" in vars(module) for module in runner.model.modules())


def test_rows_are_bit_equal_alone_and_beside_others(empty: LLM, models: dict[str, Path]) -> None:
    runner = empty.engine.runner
    empty.add_lora(LoRARequest("all", 1, models["all"]))
    empty.add_lora(LoRARequest("patterns", 2, models["patterns"]))

    def row(number: int, adapter: int) -> ForwardRow:
        table = BlockTable(4)
        table.extend([2 * number, 2 * number + 1])
        return ForwardRow([7 + number, 9, 11, 30, 2], 0, table, adapter=adapter)

    rows = [row(0, 0), row(1, -1), row(2, 1), row(3, 1), row(4, 0)]
    together = runner.forward(rows).view(5, 5, -1).clone()
    for number, each in enumerate(rows):
        assert torch.equal(runner.forward([each]), together[number])


def test_the_plan_is_what_is_allocated(models: dict[str, Path]) -> None:
    config = EngineConfig.create(models["target"], lora_modules=modules(models), max_loras=3, **COMMON)
    planned = plan_engine(config)
    assert planned.adapters is not None
    assert planned.adapters.rank == 16  # the least without max_lora_rank
    assert dict(planned.plan.parts)["LoRA adapters"] == planned.adapters.num_bytes
    with LLM(models["target"], lora_modules=modules(models), max_lora_rank=8, max_loras=3, **COMMON) as llm:
        layers = llm.engine.runner.adapters
        assert layers is not None
        assert llm.engine.plan.adapters == sum(buffer.nbytes for buffer in layers.buffers())
        assert llm.engine.plan.total_bytes <= llm.engine.plan.budget_bytes
        assert set(layers.names) == {
            f"model.layers.{number}.{part}.{name}"
            for number in range(3)
            for part, names in (("self_attn", ALL_LINEARS[:4]), ("mlp", ALL_LINEARS[4:]))
            for name in names
        }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"lora_modules": {"a": "all"}, "max_lora_rank": 4},
            CheckpointError,
            "has rank 8, and max_lora_rank is 4; start with",
        ),
        (
            {"lora_modules": {"a": "all", "b": "patterns"}, "max_loras": 1},
            ConfigurationError,
            "max_loras=1 is less than the 2",
        ),
        (
            {"lora_modules": {"a": "all"}, "tensor_parallel_size": 2},
            ConfigurationError,
            "tensor_parallel_size=2: LoRA adapters cannot be split yet; use 1",
        ),
        ({"max_loras": 3}, ConfigurationError, "need enable_lora=True or lora_modules"),
        ({"lora_modules": {"a": "target"}}, CheckpointError, "has no adapter_config.json.* it is a model"),
        ({"lora_modules": {"a": "nowhere"}}, CheckpointError, "is not a folder with a checkpoint"),
        ({"lora_modules": "all"}, ConfigurationError, "lora_modules='all': expected a mapping of names to folders"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_the_plan(
    models: dict[str, Path], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if isinstance(options.get("lora_modules"), dict):
        folders = {name: models["root"] / folder for name, folder in options["lora_modules"].items()}
        options = {**options, "lora_modules": folders}
    with pytest.raises(error, match=message):
        plan_engine(EngineConfig.create(models["target"], **COMMON, **options))


def test_requests_that_name_what_is_not_there(empty: LLM, models: dict[str, Path]) -> None:
    empty.add_lora(LoRARequest("all", 1, models["all"]))
    for wanted, message in [
        ("x", r"prompts\[0\]: lora_request: no adapter 'x' is loaded \(loaded: all\)"),
        (3, r"prompts\[0\]: lora_request=3: expected a LoRARequest"),
        (LoRARequest("all", 2, models["attention"]), r"'all' \(number 2\): 'all' \(number 1, .* is loaded already"),
        (LoRARequest("b", 1, models["attention"]), r"'b' \(number 1\): 'all' \(number 1, .* is loaded already"),
        (LoRARequest("c", 4, models["target"]), "lora_request 'c': .* has no adapter_config.json"),
        (["all", "all"], "2 lora_requests for 1 prompts"),
    ]:
        with pytest.raises(RequestError, match=message):
            empty.generate([[3, 4]], GREEDY, lora_request=wanted)
    with pytest.raises(RequestError, match="is loaded already"):
        empty.add_lora(LoRARequest("all", 1, models["all"]))
    assert_idle(empty)


def test_without_the_option(models: dict[str, Path]) -> None:
    with LLM(models["target"], **COMMON) as llm:
        assert llm.list_loras() == set()
        for call in (
            lambda: llm.generate([[3]], lora_request=LoRARequest("a", 1, models["all"])),
            lambda: llm.add_lora(LoRARequest("a", 1, models["all"])),
            lambda: llm.remove_lora(1),
        ):
            with pytest.raises(RequestError, match="adapters are off; start with enable_lora=True or lora_modules"):
                call()
