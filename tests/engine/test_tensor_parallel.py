"""Two ranks generate what `generate` does, with every speculator; a rank that dies ends the engine and leaves no process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from specplug import LLM, ConfigurationError, EngineDeadError, SamplingParams, StartupError, UnsupportedModelError
from specplug.model.architecture.inspection import inspect_architecture
from specplug.model.parallel.torchrun import launched_rank
from support.drafting import drafted_by, perturbed_copy
from support.engines import assert_idle, squeeze_blocks
from support.heads import save_eagle3
from support.models import VOCABULARY, make_config, save_model
from support.processes import ends_within, is_running
from support.quantised import save_quantised
from support.recurrent import RECURRENT, save_recurrent
from support.reference import decisive_prompts
from support.speculators import Oracle, TreeSpeculator, provide

NEW_TOKENS = 18
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
slow = pytest.mark.slow


def parallel(folder: Path, **options: Any) -> LLM:
    common: dict[str, Any] = {"skip_tokenizer_init": True, "strict": True, "compile": False, "memory": "64MiB"}
    return LLM(folder, tensor_parallel_size=2, **{**common, **options})


def workers(llm: LLM) -> list[subprocess.Popen[bytes]]:
    return [worker.process for worker in llm.engine.runner.ranks._workers]  # type: ignore[attr-defined]


@slow
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gemma3_text", "mixtral", "gpt_oss", "deepseek_v3", "phi3", "olmo2"]
)
def test_two_ranks_equal_generate(architecture: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", architecture)
    cases = decisive_prompts(folder, 4, NEW_TOKENS, VOCABULARY)
    with parallel(folder, max_num_batched_tokens=40) as llm:
        outputs = llm.generate([prompt for prompt, _ in cases], GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == [tokens for _, tokens in cases]
        assert_idle(llm)


@slow
@pytest.mark.parametrize("speculator", ["ngram", "draft_model", "eagle3", "tree"])
def test_every_speculator_drafts_for_two_ranks(speculator: str, tmp_path: Path) -> None:
    """Drafting and verification are the first rank's; the other one moves its KV after a tree, a fork and a preemption."""
    target = save_model(tmp_path / "target", "llama", eos_token_id=None)
    cases = decisive_prompts(target, 8, NEW_TOKENS, VOCABULARY)
    options: dict[str, Any]
    if speculator == "ngram":
        ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
        options = {"speculative_config": ngram}
    elif speculator == "draft_model":
        options = drafted_by(perturbed_copy(target, tmp_path / "draft", 0.05))
    elif speculator == "eagle3":
        head = str(save_eagle3(tmp_path / "head"))
        options = {"speculative_config": {"method": "eagle3", "model": head, "num_speculative_tokens": 3}}
    else:
        oracle = Oracle([[*prompt, *tokens] for prompt, tokens in cases], VOCABULARY)
        options = provide(lambda config, its: TreeSpeculator(oracle, (0, 2, "final"), 9, top_k=2))
    sampled = SamplingParams(temperature=0.9, seed=3, n=3, max_tokens=12)
    prompts = [prompt for prompt, _ in cases]
    with parallel(target, block_size=4, max_num_seqs=6, max_num_batched_tokens=64, **options) as llm:
        squeeze_blocks(llm, 24)
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == [tokens for _, tokens in cases]
        assert llm.engine.stats.num_draft_tokens > 0
        forked = [[o.token_ids for o in out.outputs] for out in llm.generate(prompts, sampled, use_tqdm=False)]
        assert llm.engine.scheduler.num_preemptions > 0
        assert_idle(llm)
    with LLM(target, skip_tokenizer_init=True, compile=False, memory="64MiB") as alone:
        expected = [[o.token_ids for o in out.outputs] for out in alone.generate(prompts, sampled, use_tqdm=False)]
    assert forked == expected or speculator != "ngram"  # drafts with probabilities use other random numbers


@slow
@pytest.mark.parametrize("compiled", [False, True])
def test_ranks_run_ahead(compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that computes while the host goes on, a forward's ids come from the first rank's device.

    A CPU is treated as such a device. Compiled, the sums over the ranks are part of the machine code.
    """
    monkeypatch.setattr("specplug.engine.startup.allocation.computes_ahead", lambda device: True)
    folder = save_model(tmp_path / "model", "llama", eos_token_id=None)
    cases = decisive_prompts(folder, 6, NEW_TOKENS, VOCABULARY)
    with parallel(folder, compile=compiled, max_num_batched_tokens=40) as llm:
        assert (llm.engine.runner.compiled is not None) == compiled
        drawn = []
        draw = llm.engine._verification.draw
        monkeypatch.setattr(llm.engine._verification, "draw", lambda *given: drawn.append(1) or draw(*given))
        outputs = llm.generate([prompt for prompt, _ in cases], GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == [tokens for _, tokens in cases]
        assert len(drawn) > NEW_TOKENS // 2
        assert_idle(llm)


@slow
def test_ranks_that_differ_run_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What one rank can compile and another cannot must not leave one of them in a sum for ever."""
    folder = save_model(tmp_path / "model", "llama", eos_token_id=None)
    ((prompt, expected),) = decisive_prompts(folder, 1, NEW_TOKENS, VOCABULARY)
    monkeypatch.setenv("SPECPLUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("specplug.model.parallel.ranks.WORKER", "support.rank_without_compiler")
    with parallel(folder, compile=True) as llm:
        assert llm.engine.runner.compiled is None
        assert "runs uncompiled: another rank could not compile its part" in caplog.text
        assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


@slow
def test_a_rank_that_dies_ends_the_engine_and_leaves_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", eos_token_id=None)
    with parallel(folder) as llm:
        (worker,) = workers(llm)
        llm.engine.add_request("long", [3, 4, 5], SamplingParams(temperature=0, max_tokens=120))
        for _ in range(5):
            llm.engine.step()
        worker.send_signal(signal.SIGKILL)
        started = time.monotonic()
        worker.wait(10)
        with pytest.raises(EngineDeadError, match=r"rank 1 of 2 ended \(exit status -9\).*start a new engine"):
            llm.engine.step()
        with pytest.raises(EngineDeadError, match="rank 1 of 2"):
            llm.engine.step()
        assert time.monotonic() - started < 20
        assert worker.poll() is not None
    with parallel(folder) as again:  # the process can start another
        assert again.generate([[3, 4, 5]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@slow
def test_ranks_end_with_the_first_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", eos_token_id=None)
    script = (
        "import sys, time\nfrom specplug import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, skip_tokenizer_init=True, compile=False, memory='64MiB', tensor_parallel_size=2)\n"
        "print(llm.engine.runner.ranks._workers[0].process.pid, flush=True)\n"
        "while True:\n    llm.generate([[3, 4]], SamplingParams(temperature=0, max_tokens=90), use_tqdm=False)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert first.stdout is not None
        pid = int(first.stdout.readline())
        time.sleep(1)
    finally:
        first.kill()
        first.wait()
    assert ends_within(pid, 20)


@slow
@pytest.mark.parametrize("forgets", ["pass", "del llm"])
def test_an_engine_that_nobody_closes_does_not_keep_python(forgets: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", eos_token_id=None)
    script = (
        "from specplug import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, skip_tokenizer_init=True, compile=False, memory='64MiB', tensor_parallel_size=2)\n"
        "llm.generate([[3, 4]], SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)\n"
        f"print(llm.engine.runner.ranks._workers[0].process.pid)\n{forgets}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not is_running(int(done.stdout))


@slow
def test_a_rank_that_cannot_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model", "llama")
    monkeypatch.setattr("specplug.model.parallel.ranks.WORKER", "specplug.no_such_module")
    with pytest.raises(StartupError, match="rank 1 of 2 failed: exit status 1"):
        parallel(folder)


def test_plan_of_a_rank() -> None:
    """Heads, weights and KV are split where they can be, else whole; embedding and output layer are always whole."""
    import torch

    whole = inspect_architecture(make_config("llama"), torch.float32)
    half = whole.of_rank(2)
    assert [layer.num_heads for layer in half.kv_layers] == [1, 1, 1]
    assert half.weight_bytes == whole.weight_bytes - whole.shards.split_bytes // 2
    assert {"lm_head", "model.embed_tokens"} & half.shards.rules.keys()
    assert all(half.shards.rules.get(name) in (None, "replicate") for name in ("lm_head", "model.embed_tokens"))
    third = whole.of_rank(3)  # 4 heads: attention is whole, the feed-forward network is split
    assert third.kv_layers == whole.kv_layers
    assert whole.weight_bytes > third.weight_bytes > half.weight_bytes
    shared = inspect_architecture(make_config("llama", num_key_value_heads=1), torch.float32).of_rank(2)
    assert [layer.num_heads for layer in shared.kv_layers] == [1, 1, 1]
    assert shared.shards.rules["model.layers.*.self_attn.q_proj"] == "colwise"
    assert shared.shards.rules["model.layers.*.self_attn.k_proj"] == "replicate"


@slow
def test_ranks_of_torchrun(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    ((prompt, expected),) = decisive_prompts(folder, 1, NEW_TOKENS, VOCABULARY)
    script = tmp_path / "script.py"
    script.write_text(
        "from specplug import LLM, SamplingParams\n"
        f"with LLM({str(folder)!r}, skip_tokenizer_init=True, compile=False, memory='64MiB', tensor_parallel_size=2) as llm:\n"
        f"    out = llm.generate([{prompt}], SamplingParams(temperature=0, max_tokens={NEW_TOKENS}), use_tqdm=False)\n"
        "    print('tokens', out[0].outputs[0].token_ids)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "tokens" in line] == [f"tokens {expected}"]


def test_torchrun_with_another_number() -> None:
    environment = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "3"}
    assert launched_rank(4, environment) == 3
    assert launched_rank(2, {}) is None
    with pytest.raises(ConfigurationError, match="--nproc-per-node 2"):
        launched_rank(2, environment)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (
            "fp8",
            {},
            ConfigurationError,
            "tensor_parallel_size=2: quantised weights cannot be split yet; take a checkpoint",
        ),
        (
            "llama",
            {"quantization": "int8"},
            ConfigurationError,
            "quantization='int8' runs in one process; leave it out",
        ),
        ("qwen3_next", {}, UnsupportedModelError, "tensor_parallel_size=2: .* keeps recurrent state, .* use 1"),
        ("lfm2", {}, UnsupportedModelError, "tensor_parallel_size=2: .* keeps recurrent state, .* use 1"),
        (
            "gpt2",
            {},
            UnsupportedModelError,
            "tensor_parallel_size=2: Transformers has no tensor parallel plan for .*; use 1",
        ),
        (
            "llama",
            {"enable_lora": True},
            ConfigurationError,
            "tensor_parallel_size=2: LoRA adapters cannot be split yet",
        ),
    ],
)
def test_what_cannot_be_split_is_one_error(
    tmp_path: Path, kind: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Before any rank is started."""
    if kind == "fp8":
        folder = save_quantised(tmp_path, kind, "bfloat16")
    else:
        folder = save_recurrent(tmp_path, kind) if kind in RECURRENT else save_model(tmp_path / "model", kind)
    common = {"skip_tokenizer_init": True, "compile": False, "memory": "64MiB", "device": "cpu"}
    with pytest.raises(error, match=message) as caught:
        LLM(folder, tensor_parallel_size=2, **common, **options)
    assert type(caught.value) is error
