"""Compiled forwards of targets with recurrent state, whose layers our kernels run."""

from __future__ import annotations

from pathlib import Path

import pytest

from specplug import LLM, SamplingParams, native
from support.engines import assert_idle
from support.marks import slow_except
from support.models import VOCABULARY
from support.recurrent import save_recurrent
from support.reference import decisive_prompts
from support.speculators import Oracle, TreeSpeculator, provide

pytestmark = pytest.mark.engine
NEW_TOKENS = 14


@pytest.mark.skipif(not native.load(), reason="no kernels on this machine")
@pytest.mark.parametrize("kind", slow_except(["lfm2", "qwen3_5_text", "kimi_linear", "bamba", "jamba"]))
def test_output_is_that_of_transformers(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32, token for token, in a ragged batch with trees and chunked prompts; a second start takes it from disk."""
    monkeypatch.setenv("SPECPLUG_CACHE", str(tmp_path / "cache"))
    folder = save_recurrent(tmp_path / "model", kind, layers=2)  # each more is compiled for five seconds
    pairs = decisive_prompts(folder, 6, NEW_TOKENS, VOCABULARY)
    oracle = Oracle([prompt + output for prompt, output in pairs], VOCABULARY)
    options = {"skip_tokenizer_init": True, "memory": "64MiB", "strict": True, "compile": True, "block_size": 4}
    options |= {"max_num_batched_tokens": 24, "max_num_seqs": 4}
    options |= provide(lambda config, target: TreeSpeculator(oracle, ("final", 0, 1), 9, top_k=2))
    for _ in range(2):
        with LLM(folder, **options) as llm:
            compiled = llm.engine.runner.compiled
            assert (compiled is not None) == (kind not in ("jamba", "kimi_linear"))
            outputs = llm.generate(
                [prompt for prompt, _ in pairs], SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
            )
            assert [output.outputs[0].token_ids for output in outputs] == [output for _, output in pairs]
            assert llm.engine.stats.num_accepted_draft_tokens > 8
            assert_idle(llm)
