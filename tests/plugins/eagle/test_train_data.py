"""Texts become tokens with a loss mask, batches keep their promises, and bad input is one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_targets import VOCABULARY, make_target, write_lines, write_texts
from transformers import AutoTokenizer

from specplug import ConfigurationError, resolve_model
from specplug_eagle.train.__main__ import main
from specplug_eagle.train.batches import collate, plan_epoch
from specplug_eagle.train.data import choose_vocabulary, count_tokens, read_prompts, read_samples
from specplug_eagle.train.loop import schedule

pytestmark = pytest.mark.unit

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE = TURN + "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read_one(tmp_path: Path, tokenizer: Any, entry: object) -> tuple[str, str]:
    """A text, and the part of it that is learned."""
    (sample,) = read_samples(write_lines(tmp_path / "data.jsonl", [entry]), tokenizer, 4096, 2048)
    return tokenizer.decode(sample.ids), tokenizer.decode(sample.ids[sample.learned])


def test_plain_text_is_learned_whole(tmp_path: Path, tokenizer: Any) -> None:
    assert read_one(tmp_path, tokenizer, {"text": "def f(x):"}) == ("def f(x):", "def f(x):")


def test_of_prompt_and_completion_the_completion_and_its_end_are_learned(tmp_path: Path, tokenizer: Any) -> None:
    entry = {"prompt": "def f(x):", "completion": " return x"}
    assert read_one(tmp_path, tokenizer, entry)[1] == " return x<|endoftext|>"


def test_of_a_conversation_all_answers_are_learned(tmp_path: Path, tokenizer: Any) -> None:
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text, learned = read_one(tmp_path, tokenizer, {"messages": messages})
    assert text == "<user>one\n<assistant>two\n<user>three\n<assistant>four\n"
    assert learned == "two\nfour\n"
    prompts = read_prompts(write_lines(tmp_path / "p.jsonl", [{"messages": messages}]), tokenizer, 64)
    assert tokenizer.decode(prompts[0]) == "<user>one\n<assistant>two\n<user>three\n<assistant>"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: not JSON"),
        ([1], "line 2: expected an object with one of"),
        ({"text": "a", "prompt": "b"}, "line 2: expected an object with one of"),
        ({"text": 3}, 'line 2: "text" and its completion should be strings'),
        ({"input_ids": [1, "2"]}, 'line 2: "input_ids" should be a list of integers'),
        ({"input_ids": [1, 2, 3], "loss_from": -1}, 'line 2: "input_ids" should be a list of integers'),
        ({"input_ids": [1, 2, 5000]}, "line 2: ValueError: token 5000 is not among the target's 4096 tokens"),
        ({"prompt": "a"}, 'line 2: "prompt" comes without "completion"'),
        ({"messages": [{"content": "a"}]}, 'line 2: "messages" should be a list of objects with a "role"'),
        ({"messages": [{"role": "user", "content": "a"}]}, 'line 2: "messages" holds no answer'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, line: object, told: str) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"text": "def f(x): return x"}, line])
    with pytest.raises(ConfigurationError) as caught:
        read_samples(file, tokenizer, 4096, 2048)
    assert told in str(caught.value)


def test_a_file_without_anything_to_learn_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigurationError, match="holds no text of at least 3 tokens"):
        read_samples(write_lines(tmp_path / "data.jsonl", [{"input_ids": [1, 2]}]), tokenizer, 4096, 2048)


def test_the_draft_vocabulary_is_the_most_frequent_tokens_ties_by_id(tmp_path: Path) -> None:
    lines: list[object] = [{"input_ids": [9, 9, 9, 4, 4, 7, 1], "loss_from": 1}]
    counts = count_tokens(read_samples(write_lines(tmp_path / "d.jsonl", lines), None, 12, 64), 12)
    assert counts.tolist() == [0, 1, 0, 0, 2, 0, 0, 1, 0, 2, 0, 0]
    assert choose_vocabulary(counts, 3).tolist() == [1, 4, 9]
    assert choose_vocabulary(counts, 6).tolist() == [0, 1, 2, 4, 7, 9]


def test_an_epoch_holds_every_text_once_in_an_order_of_its_own() -> None:
    lengths = torch.randint(3, 60, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    first, again, second = (plan_epoch(lengths, 256, 1, epoch) for epoch in (0, 0, 1))
    assert first == again
    assert first != second
    for plan in (first, second):
        assert sorted(index for batch in plan for index in batch) == list(range(500))
        assert all(max(lengths[i] for i in batch) * len(batch) <= 256 for batch in plan)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in first)
    assert padded < 1.15 * sum(lengths)


def test_labels_are_the_positions_before_learned_tokens(tmp_path: Path) -> None:
    lines: list[object] = [{"input_ids": [5, 6, 7, 8, 9], "loss_from": 3}, {"input_ids": [5, 6, 7]}]
    samples = read_samples(write_lines(tmp_path / "d.jsonl", lines), None, VOCABULARY, 64)
    batch = collate(samples, (0, 1), torch.device("cpu"))
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]]
    assert batch.labels.tolist() == [2, 3, 5 + 1]


def test_the_rate_rises_and_falls() -> None:
    rates = [schedule(step / 100, 0.1) for step in range(101)]
    assert rates[5] == pytest.approx(0.5)
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"--target": "/nonexistent"}, "the target '/nonexistent' cannot be loaded"),
        ({"--data": "/nonexistent.jsonl"}, "/nonexistent.jsonl cannot be read"),
        ({"--layer-ids": "2,4,9"}, "target layer id 9 does not exist: the target has 8 layers"),
        ({"--draft-vocab-size": "99"}, "a draft vocabulary of 99 tokens is more than the target's 48"),
        ({"--hidden-size": "16"}, "cannot borrow the target's: its hidden size is 16"),
        ({"--num-kv-heads": "3"}, "4 heads cannot share 3"),
        ({"--lm-head": "borrow", "--draft-vocab-size": "40"}, "leave out --draft-vocab-size"),
    ],
)
def test_bad_arguments_are_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], told: str
) -> None:
    make_target(tmp_path / "target")
    given = {"--target": str(tmp_path / "target"), "--data": str(write_texts(tmp_path / "data.jsonl"))}
    given |= {"--out": str(tmp_path / "out"), "--device": "cpu"}
    assert main([part for pair in (given | change).items() for part in pair]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
