"""Requests of a lower priority number are served first and preempted last, and no output depends on it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import attrs
import pytest

from specplug import LLM, SamplingParams
from specplug.errors import ConfigurationError, RequestError
from specplug.testing.models import save_words
from support.engines import assert_idle, squeeze_blocks
from support.models import VOCABULARY, save_model

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "memory": "32MiB",
    "check_parity": False,
    "compile": False,
    "block_size": 4,
    "max_num_batched_tokens": 24,
    "max_model_len": 64,
    "max_num_seqs": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(save_model(tmp_path_factory.mktemp("model"), "llama"), VOCABULARY)


@pytest.mark.parametrize("method", [None, {"method": "ngram", "prompt_lookup_min": 1}])
def test_no_output_depends_on_priorities(folder: Path, method: dict[str, Any] | None) -> None:
    chooser = random.Random(0)
    prompts = [[chooser.randrange(3, VOCABULARY) for _ in range(chooser.choice((4, 9, 30)))] for _ in range(16)]
    priorities = [chooser.randrange(-2, 3) for _ in prompts]
    params = [
        attrs.evolve(GREEDY, temperature=0.8 * (index % 2), seed=index, n=1 + (index % 5 == 0))
        for index in range(len(prompts))
    ]

    def ids(outputs: Any) -> list[list[list[int]]]:
        return [[completion.token_ids for completion in output.outputs] for output in outputs]

    with LLM(folder, **OPTIONS) as llm:
        expected = ids(llm.generate(prompts, params))
    with LLM(folder, scheduling_policy="priority", speculative_config=method, **OPTIONS) as llm:
        squeeze_blocks(llm, 16)
        outputs = llm.generate(prompts, params, priority=priorities)
        assert ids(outputs) == expected
        assert llm.engine.scheduler.num_preemptions > 0
        assert_idle(llm)


def test_urgent_requests_come_first(folder: Path) -> None:
    priorities = [3, 0, 3, -5, 0]
    with LLM(folder, scheduling_policy="priority", **{**OPTIONS, "max_num_seqs": 1}) as llm:
        outputs = llm.generate([[3, 4]] * 5, GREEDY, priority=priorities)
        plain = llm.generate([[3, 4]] * 5, GREEDY)
    assert _order(outputs) == [3, 1, 4, 0, 2]
    assert _order(plain) == [0, 1, 2, 3, 4]


def test_chats_have_priorities_too(folder: Path) -> None:
    chats = [[{"role": "user", "content": word}] for word in ("w3.", "w4.", "w5.")]
    with LLM(folder, scheduling_policy="priority", **{**OPTIONS, "max_num_seqs": 1}) as llm:
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        outputs = llm.chat(chats, GREEDY, priority=[2, 1, 0], chat_template=template)
    assert _order(outputs) == [2, 1, 0]


def _order(outputs: Any) -> list[int]:
    return sorted(range(len(outputs)), key=lambda index: outputs[index].metrics.first_token_time)


def test_wrong_priorities_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="scheduling_policy='lifo': expected 'fcfs' or 'priority'"):
        LLM(folder, scheduling_policy="lifo", **OPTIONS)
    with LLM(folder, **OPTIONS) as llm:
        assert llm.generate([[3]], GREEDY, priority=[0])[0].finished
        with pytest.raises(RequestError, match=r"prompts\[1\]: priority=2: .* scheduling_policy='priority'"):
            llm.generate([[3], [4]], GREEDY, priority=[0, 2])
    with LLM(folder, scheduling_policy="priority", **OPTIONS) as llm:
        for wrong, message in (
            (1, "priority=1: expected a list with an integer for each prompt"),
            ([1], "1 priorities for 2 prompts"),
            ([1, 0.5], "priority=0.5: expected an integer"),
            ([True, 0], "priority=True: expected an integer"),
        ):
            with pytest.raises(RequestError, match=message):
                llm.generate([[3], [4]], GREEDY, priority=wrong)  # type: ignore[arg-type]
        assert_idle(llm)
