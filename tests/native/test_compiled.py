"""A compiled forward is the model's own function; it is kept on disk, and what cannot be compiled runs as it is."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from specplug import LLM, SamplingParams, native
from specplug.engine.startup import start
from specplug.model.compile import compiled, runners
from specplug.model.compile.forwards import measure_forward_change, over_rows
from support.adapters import merge_adapter, save_adapter
from support.interpreted import interpret
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.reference import decisive_prompts
from support.speculators import Oracle, TreeSpeculator, provide

pytestmark = pytest.mark.engine

NEW_TOKENS = 14


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    native.load()  # from the usual cache: a new one holds no kernels
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECPLUG_CACHE", str(folder))
        yield folder


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    own = compiled.compile_graph
    monkeypatch.setattr(compiled, "compile_graph", lambda *graph: (made.append(graph), own(*graph))[1])
    return made


def change_by_compiling(runner: Any) -> float:
    forward, runner.compiled = runner.compiled, None
    change = measure_forward_change(runner, over_rows(runner, forward.over_tensors))
    runner.compiled = forward
    return change


@pytest.mark.parametrize("architecture", slow_except(["llama", "gemma2", "opt"], "llama"))
def test_output_is_that_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Float32, token for token: alone and in a ragged batch, with trees that read hidden states at several boundaries."""
    folder = save_model(tmp_path, architecture, num_hidden_layers=2)  # each more is compiled for five seconds
    pairs = decisive_prompts(folder, 6, NEW_TOKENS, VOCABULARY)
    oracle = Oracle([prompt + output for prompt, output in pairs], VOCABULARY)
    options = {
        "skip_tokenizer_init": True,
        "memory": "64MiB",
        "strict": True,
        "compile": True,
        "max_num_batched_tokens": 24,
        "max_num_seqs": 4,
        **provide(lambda config, target: TreeSpeculator(oracle, ("final", 1, 0, 2), 9, top_k=2)),
    }
    made = count_compilations(monkeypatch)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    for memory in ("64MiB", "48MiB"):  # another size of the cache: nothing is compiled anew
        with LLM(folder, **{**options, "memory": memory}) as llm:
            assert llm.engine.runner.compiled is not None, caplog.text
            assert change_by_compiling(llm.engine.runner) < 1e-5
            alone = llm.generate([pairs[0][0]], greedy)[0].outputs[0].token_ids
            together = llm.generate([prompt for prompt, _ in pairs], greedy)
            assert llm.engine.stats.num_accepted_draft_tokens > 10
        assert alone == pairs[0][1]
        assert [output.outputs[0].token_ids for output in together] == [output for _, output in pairs]
    assert len(made) == 1


@pytest.mark.slow
def test_draft_models_are_compiled_too_and_weights_are_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specplug.testing.leaks import live_bytes

    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 1}
    folder = save_model(tmp_path / "target", "llama", **sizes)
    config = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    options = {"skip_tokenizer_init": True, "dtype": "bfloat16", "device": "cpu", "memory": "64MiB"}
    options["speculative_config"] = config
    asked: list[list[Any]] = []
    own = runners.compile_forwards
    monkeypatch.setattr(start, "compile_forwards", lambda given, *rest: (asked.append(given), own(given, *rest)))
    held = {}
    for choice in (False, True):
        with LLM(folder, compile=choice, **options) as llm:
            assert (llm.engine.runner.compiled is not None) == choice
            assert [len(given) for given in asked] == ([2] if choice else [])
            assert all(runner.compiled is not None for given in asked for runner in given)
            llm.generate([[3, 4, 5]], SamplingParams(max_tokens=5))
            held[choice] = live_bytes()
    asked.clear()
    assert held[True] <= held[False] * 1.01


@attrs.frozen
class Compiled:
    """A model that was compiled once.

    Attributes:
        folder: of the model.
        options: with which an engine compiles it.
        written: the file that compiling it left.
        elsewhere: the folder that the environment names to the compiler.
    """

    folder: Path
    options: dict[str, Any]
    written: Path
    elsewhere: Path


@pytest.fixture(scope="module")
def once(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = save_model(tmp_path_factory.mktemp("small"), "llama", hidden_size=36, num_hidden_layers=1)
    options = {"skip_tokenizer_init": True, "device": "cpu", "memory": "64MiB", "compile": True}
    before = set((own_cache / "forwards").glob("*.bin"))
    elsewhere = folder / "elsewhere"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(elsewhere))
        LLM(folder, **options).close()
    (written,) = set((own_cache / "forwards").glob("*.bin")) - before
    return Compiled(folder, options, written, elsewhere)


def raising(*inputs: Any) -> Any:
    raise KeyError("no such thing\nin the artifact")


def wrong(artifact: Any) -> Any:
    def call(*inputs: Any) -> Any:
        logits, *states = artifact(*inputs)
        return logits * 1.5, *states

    return call


def assert_replaced(folder: Path, options: dict[str, Any], made: list[Any], patch: pytest.MonkeyPatch) -> None:
    """Compiled anew, once, without a word, although loading may be spoilt by a patch; the next start finds what works."""
    made.clear()
    with LLM(folder, **options) as llm:
        assert llm.engine.runner.compiled is not None
        assert change_by_compiling(llm.engine.runner) < 1e-5
    assert len(made) == 1
    patch.undo()
    with LLM(folder, **options) as llm:
        assert llm.engine.runner.compiled is not None
    assert len(made) == 1


@pytest.mark.slow
def test_a_file_that_is_cut_off_is_replaced(
    once: Compiled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = count_compilations(monkeypatch)
    once.written.write_bytes(once.written.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        assert_replaced(once.folder, once.options, made, pytest.MonkeyPatch())
    assert not [record for record in caplog.records if record.name == "specplug"]
    assert once.written.is_file()


@pytest.mark.parametrize("fault", ["raises", "other results"])
def test_a_file_that_does_not_work_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import CompiledArtifact

    made = interpret(monkeypatch)
    folder = save_model(tmp_path, "llama", hidden_size=44, num_hidden_layers=1)
    options = {"skip_tokenizer_init": True, "device": "cpu", "memory": "64MiB", "compile": True}
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as spoilt:
        LLM(folder, **options).close()
        load = CompiledArtifact.load
        spoilt.setattr(CompiledArtifact, "load", lambda **how: wrong(load(**how)) if fault != "raises" else raising)
        assert_replaced(folder, options, made, spoilt)
    assert not [record for record in caplog.records if record.name == "specplug"]


@pytest.mark.parametrize(("fault", "message"), [("raises", "KeyError: "), ("other results", "it gives other logits")])
def test_what_does_not_work_when_new_is_not_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
    fault: str,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line of warning, an engine that runs, and nothing on disk."""
    monkeypatch.setattr(compiled, "compile_graph", lambda graph, inputs: raising if fault == "raises" else wrong(graph))
    before = set((own_cache / "forwards").glob("*.bin"))
    folder = save_model(tmp_path, "llama", hidden_size=28, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING):
        llm = LLM(folder, skip_tokenizer_init=True, memory="64MiB", compile=True)
    assert llm.engine.runner.compiled is None
    assert len(llm.generate([[3, 4, 5]], SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3
    llm.close()
    (record,) = [each for each in caplog.records if each.name == "specplug"]  # some PyTorch versions trace themselves
    assert record.getMessage().startswith("LlamaForCausalLM runs uncompiled: ")
    assert message in record.getMessage()
    assert "\n" not in record.getMessage()
    assert set((own_cache / "forwards").glob("*.bin")) == before


@pytest.mark.slow
def test_the_compiler_works_in_our_own_folder(monkeypatch: pytest.MonkeyPatch, own_cache: Path, once: Compiled) -> None:
    """Not in a predictable one below /tmp, neither when it compiles nor when what it made is loaded."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(once.elsewhere))
    made = count_compilations(monkeypatch)
    work = own_cache / "forwards" / "inductor" / once.written.stem
    assert list(work.rglob("*.so"))
    assert sum(file.stat().st_size for file in work.rglob("*")) < 16 << 20, "precompiled headers are not kept"
    shutil.rmtree(work)
    with LLM(once.folder, **once.options) as llm:
        assert llm.engine.runner.compiled is not None
    assert not made
    assert list(work.rglob("*.so"))
    assert not once.elsewhere.exists()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(once.elsewhere)


def test_a_cache_that_others_may_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("SPECPLUG_CACHE", str(shared))
    with caplog.at_level(logging.WARNING):
        llm = LLM(save_model(tmp_path, "llama"), skip_tokenizer_init=True, memory="64MiB", compile=True)
    assert llm.engine.runner.compiled is None
    llm.close()
    (record,) = caplog.records
    assert "others may write to" in record.getMessage()
    assert not list(shared.iterdir())


def test_a_model_that_cannot_be_traced_runs_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Float32 experts have no shapes-only implementation: one line of warning, nothing else."""
    folder = save_model(tmp_path, "mixtral")
    (pair,) = decisive_prompts(folder, 1, 6, VOCABULARY)
    with caplog.at_level(logging.WARNING):
        llm = LLM(folder, skip_tokenizer_init=True, device="cpu", memory="64MiB", compile=True)
    (record,) = caplog.records
    assert record.getMessage().startswith("MixtralForCausalLM runs uncompiled: ")
    assert "\n" not in record.getMessage()
    assert capfd.readouterr().err == ""
    assert llm.generate([pair[0]], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].token_ids == pair[1]
    llm.close()


def test_small_models_go_without_unless_asked(tmp_path: Path) -> None:
    assert not runners.wants_compilation("auto", 11 << 20)
    assert runners.wants_compilation("auto", 64 << 20)
    assert runners.wants_compilation(True, 1)
    assert not runners.wants_compilation(False, 1 << 40)
    with LLM(save_model(tmp_path, "llama"), skip_tokenizer_init=True, memory="64MiB") as llm:
        assert llm.engine.runner.compiled is None


@pytest.mark.slow
def test_batches_with_adapters_have_a_compiled_forward_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path / "target", "llama", num_hidden_layers=1)
    adapter = save_adapter(tmp_path / "adapter", folder)
    merged = merge_adapter(tmp_path / "merged", folder, adapter)
    pairs = [decisive_prompts(each, 3, NEW_TOKENS, VOCABULARY) for each in (folder, merged)]
    todo = [(prompt, output, name) for own, name in zip(pairs, (None, "a"), strict=True) for prompt, output in own]
    todo = todo[::2] + todo[1::2]
    made = count_compilations(monkeypatch)
    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "memory": "64MiB",
        "compile": True,
        "max_num_batched_tokens": 24,
    }
    with LLM(folder, lora_modules={"a": adapter}, max_num_seqs=4, **options) as llm:
        runner = llm.engine.runner
        assert (len(made), runner.compiled is not None, runner.compiled_adapted is not None) == (2, True, True)
        monkeypatch.setattr(runner.model, "forward", None)  # whatever runs is compiled
        outputs = llm.generate(
            [prompt for prompt, _, _ in todo],
            SamplingParams(temperature=0, max_tokens=NEW_TOKENS),
            lora_request=[name for _, _, name in todo],
        )
        assert [output.outputs[0].token_ids for output in outputs] == [output for _, output, _ in todo]
    assert not [record for record in caplog.records if record.name == "specplug"]
