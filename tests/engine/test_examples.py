"""Every script in examples/ runs as its first lines say, and prints something."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from specplug import LLM, SamplingParams
from support.environment import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_example(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"python examples/{script.name}" in script.read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_a_loop_of_ones_own_drafts_on_a_device_that_computes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, rows that join and leave, and drafts that the host sees late: the output is the target's."""
    looped = runpy.run_path(str(ROOT / "examples" / "draft_loop.py"))["LoopedDraft"]
    monkeypatch.setattr("specplug.engine.startup.allocation.computes_ahead", lambda device: True)
    prompts = ["import os\n", "def main(argv):\n    ", "class Node:\n    def __init__(self", "x = [1, 2,", "# hash\n"]
    params = [SamplingParams(temperature=0, max_tokens=6 + 5 * row, ignore_eos=True) for row in range(len(prompts))]
    options: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 3, "max_num_batched_tokens": 16, "compile": False}
    config = {"method": "looped", "num_speculative_tokens": 3}
    found = []
    for more in ({}, {"plugins": {"looped": looped}, "speculative_config": config, "strict": True}):
        with LLM("tiny", **options, **more) as llm:
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
            accepted = llm.engine.stats.num_accepted_draft_tokens
    assert found[0] == found[1]
    assert accepted > 20
