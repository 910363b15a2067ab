"""How many of core's files a decode step enters: what somebody has to read who wants to follow one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import specplug
from specplug import LLM, SamplingParams
from support.models import save_model

CORE = Path(specplug.__file__).parent
PLAIN, DRAFTING = 29, 41


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    target = save_model(root / "target", "llama", eos_token_id=None)
    return target, save_model(root / "draft", "llama", seed=1, num_hidden_layers=1, eos_token_id=None)


def files_of_step(llm: LLM) -> set[str]:
    """Runs one step, and returns the files of core of which a function was called."""
    entered: set[str] = set()

    def called(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        llm.engine.step()
    finally:
        sys.setprofile(before)
    return {Path(name).relative_to(CORE).as_posix() for name in entered if Path(name).is_relative_to(CORE)}


@pytest.mark.parametrize("method", [None, "draft_model"])
def test_a_step_enters_few_files(models: tuple[Path, Path], method: str | None) -> None:
    """Also one that drafts with an automatic length. The limits are what it is today, so that nobody adds to it unseen."""
    target, draft = models
    config = method and {"method": method, "model": str(draft), "num_speculative_tokens": "auto"}
    with LLM(target, skip_tokenizer_init=True, memory="64MiB", speculative_config=config) as llm:
        llm.engine.add_request("r", [3, 4, 5, 6], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        steps, drafted = [], 0
        while llm.engine.has_unfinished_requests:
            before = llm.engine.stats.num_draft_tokens
            steps.append(files_of_step(llm))
            drafted += llm.engine.stats.num_draft_tokens > before
        decoding = steps[1:-1]
    most = max(decoding, key=len)
    assert {"engine/engine.py", "engine/scheduler.py", "model/runner.py"} <= most
    assert ("speculation/adaptive/controller.py" in most) == (method is not None) == (drafted > 0)
    assert len(most) <= (DRAFTING if method else PLAIN), sorted(most)
