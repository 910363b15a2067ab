"""On two GPUs: a model split over ranks gives one GPU's tokens, sums are exact, and no rank outlives another."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.models import VOCABULARY, save_model
from support.processes import ends_within, is_running
from support.reference import decisive_prompts

NEW_TOKENS = 40
ENGINE = """
import json, sys, time
from specplug import LLM, EngineDeadError, SamplingParams
llm = LLM({folder!r}, skip_tokenizer_init=True, dtype="float32", memory="1GiB", tensor_parallel_size=2, {options})
pid = llm.engine.runner.ranks._workers[0].process.pid
"""
SUMS = """
import sys, torch
from pathlib import Path
from specplug.model.parallel import group
rank = int(sys.argv[1])
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
with group.process_group(rank, 2, Path(sys.argv[2]), device):
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in ((1, 1, 4096), (3, 7, 64), (1, 64, 4096), (5,), (1, 300, 4096)):
            torch.manual_seed(7)
            parts = [torch.randn(shape, dtype=dtype, device="cpu").to(device) for _ in range(2)]
            for _ in range(50):
                assert torch.equal(group.sum_over_ranks(parts[rank]), parts[0] + parts[1]), (dtype, shape)
    graph, part = torch.cuda.CUDAGraph(), torch.ones(1, 8, 512, dtype=torch.bfloat16, device=device)
    with torch.cuda.graph(graph):
        total = part
        for _ in range(6):
            total = group.sum_over_ranks(total)
    for value in (1, 3):
        part.fill_(value)
        graph.replay()
        assert total.eq(64 * value).all()
    torch.cuda.synchronize()
    del graph
print("equal")
"""


def run_engine(
    folder: Path, body: str, options: str = "compile=False", timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """The result of a process with an engine of two ranks."""
    script = ENGINE.format(folder=str(folder), options=options) + body
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout, check=False)


def test_sums_equal_the_parts_added(tmp_path: Path) -> None:
    """In CUDA graphs too."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SUMS, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert all(text.rstrip().endswith("equal") for text in said), said


@pytest.mark.parametrize("options", ["compile=False", "compile=True"])
@pytest.mark.parametrize("method", ["plain", "ngram"])
def test_two_gpus_equal_generate(method: str, options: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", eos_token_id=None)
    cases = decisive_prompts(folder, 4, NEW_TOKENS, VOCABULARY)
    if method == "ngram":
        options += ", speculative_config={'method': 'ngram', 'num_speculative_tokens': 3, 'prompt_lookup_min': 1}"
    body = (
        f"params = SamplingParams(temperature=0, max_tokens={NEW_TOKENS})\n"
        f"outputs = llm.generate({[prompt for prompt, _ in cases]!r}, params, use_tqdm=False)\n"
        "print(json.dumps([output.outputs[0].token_ids for output in outputs]))\nllm.close()\n"
    )
    done = run_engine(folder, body, options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [tokens for _, tokens in cases]


def test_a_rank_that_dies_ends_the_engine(tmp_path: Path) -> None:
    """Its sums are aborted: on a GPU they would wait for ever."""
    folder = save_model(tmp_path / "model", "llama", eos_token_id=None)
    body = (
        "import os, signal, threading\n"
        "threading.Timer(2, os.kill, (pid, signal.SIGKILL)).start()\n"
        "try:\n"
        "    while True:\n"
        "        llm.generate([[3, 4]] * 4, SamplingParams(temperature=0, max_tokens=90, ignore_eos=True), use_tqdm=False)\n"
        "except EngineDeadError as error:\n    print(error)\n"
        "began = time.monotonic()\nllm.close()\nprint(time.monotonic() - began)\n"
    )
    began = time.monotonic()
    done = run_engine(folder, body)
    assert done.returncode == 0, done.stderr
    said, closing = done.stdout.splitlines()[-2:]
    assert "rank 1 of 2 ended (exit status -9)" in said
    assert "start a new engine" in said
    assert float(closing) < 20
    assert time.monotonic() - began < 120


def test_ranks_end_with_the_first_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", eos_token_id=None)
    body = (
        "print(pid, flush=True)\nwhile True:\n"
        "    llm.generate([[3, 4]], SamplingParams(temperature=0, max_tokens=90, ignore_eos=True), use_tqdm=False)\n"
    )
    script = ENGINE.format(folder=str(folder), options="compile=False") + body
    first = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert first.stdout is not None
        pid = int(first.stdout.readline())
        time.sleep(3)
    finally:
        first.kill()
        first.wait()
    assert ends_within(pid, 20)


def test_an_engine_that_nobody_closes_does_not_keep_python(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", eos_token_id=None)
    done = run_engine(folder, "llm.generate([[3, 4]], use_tqdm=False)\nprint(pid)\n", timeout=120)
    assert done.returncode == 0, done.stderr
    assert not is_running(int(done.stdout.splitlines()[-1]))
