"""Training makes a head that follows its target, and the measurement says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_targets import VOCABULARY, make_target, write_lines

from specplug_eagle.head import DraftHead
from specplug_eagle.train.__main__ import main
from specplug_eagle.train.batches import collate
from specplug_eagle.train.build import head_spec, new_head
from specplug_eagle.train.data import Sample
from specplug_eagle.train.evaluate import evaluate
from specplug_eagle.train.options import HeadOptions
from specplug_eagle.train.states import LiveStates
from specplug_eagle.train.target import Target


def greedy_text(target: Target, prompt: list[int], new: int) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(target.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def chain_length(head: DraftHead, target: Target, ids: list[int], start: int, gamma: int) -> int:
    """Drafts γ tokens after ids[:start] with the head alone, and counts how many the greedy text has."""
    from attention_forms import CachedAttend

    features = target.states(torch.tensor([ids[: start - 1]]), (2, 4, 5)).features[0]
    attend = CachedAttend()
    result = head(head.embed(torch.tensor(ids[1:start])), head.fuse(features), torch.arange(start - 1), attend)
    for drafted in range(gamma):
        token = int(head.logits(result.output[-1]).argmax())
        if token != ids[start + drafted]:
            return drafted
        at = torch.tensor([start - 1 + drafted])
        result = head(head.embed(torch.tensor([token])), result.feedback[-1:], at, attend)
    return gamma


def test_measured_acceptance_length_is_that_of_real_drafting() -> None:
    target = make_target()
    options = HeadOptions()
    head = new_head(head_spec(options, target), options, target, None, 0)
    prompts = [[5, 9, 11, 30], [7, 7, 21, 3]]
    texts = [greedy_text(target, prompt, 24) for prompt in prompts]
    samples = [Sample(torch.tensor(ids, dtype=torch.int32), torch.arange(len(ids)) >= 6) for ids in texts]
    gamma = 3
    lengths = [
        1 + chain_length(head, target, ids, start, gamma) for ids in texts for start in range(6, len(ids) - gamma + 1)
    ]
    batch = collate(samples, (0, 1), target.device)
    found = evaluate(head, target, LiveStates(target, (2, 4, 5)), [batch], gamma)
    assert found.rows == len(lengths)
    assert found.greedy_length == pytest.approx(sum(lengths) / len(lengths), abs=1e-4)


def test_overlap_is_the_mass_that_both_distributions_share() -> None:
    target = make_target()
    options = HeadOptions(draft_vocab_size=20)
    members = torch.arange(0, 40, 2)
    head = new_head(head_spec(options, target), options, target, members, 0)
    ids = torch.randint(VOCABULARY, (10,), dtype=torch.int32)
    batch = collate([Sample(ids, torch.ones(10, dtype=torch.bool))], (0,), target.device)
    states = LiveStates(target, (2, 4, 5))
    found = evaluate(head, target, states, [batch], 1, temperature=0.7)
    from specplug_eagle.train.unroll import unroll

    with torch.no_grad():
        outputs = unroll(head, states(batch).features, batch.ids, 1)[0]
        p = (target.model(batch.ids).logits[0, 1:9] / 0.7).softmax(-1)
        q = torch.zeros_like(p)
        q[:, members] = (head.logits(outputs[:8]) / 0.7).softmax(-1)
    assert found.overlap[0] == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), abs=1e-5)


@pytest.mark.slow
def test_a_head_learns_and_regenerated_texts_are_the_targets_own(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", spread=0.05)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (4,), generator=generator).tolist() for _ in range(300)]
    write_lines(tmp_path / "prompts.jsonl", [{"input_ids": prompt, "loss_from": 4} for prompt in prompts])
    arguments = [
        *(
            "--target",
            str(tmp_path / "target"),
            "--data",
            str(tmp_path / "prompts.jsonl"),
            "--out",
            str(tmp_path / "out"),
        ),
        *("--device", "cpu", "--steps", "3", "--batch-tokens", "512", "--accumulate", "1", "--epochs", "6"),
        *(
            "--learning-rate",
            "1e-2",
            "--regenerate",
            "--regenerate-tokens",
            "16",
            "--regenerate-batch",
            "100",
            "--held-out-part",
            "0.15",
        ),
    ]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "regenerated.jsonl").read_text().splitlines()]
    assert len(lines) == len(prompts)
    for line in lines[::60]:
        prompt, written = line["input_ids"][: line["loss_from"]], line["input_ids"][line["loss_from"] :]
        assert greedy_text(target, prompt, 16)[4 : 4 + len(written)] == written
        assert len(written) == 16 or written[-1] == 2
    epochs = json.loads((tmp_path / "out" / "training.json").read_text())["epochs"]
    assert epochs[-1]["held_out"]["greedy_length"] > epochs[0]["held_out"]["greedy_length"] + 0.3
    assert epochs[-1]["held_out"]["agreement"][0] > 0.3


@pytest.mark.slow
def test_interrupted_writing_is_completed(tmp_path: Path) -> None:
    from specplug_eagle.train.regenerate import Writing, regenerate

    target = make_target()
    prompts = [[3, 4, 5], [9, 8], [30], [6, 7, 8, 9], [11, 12]]
    writing = Writing(max_tokens=6, temperature=1.0, batch=2)
    regenerate(target, prompts, tmp_path / "whole.jsonl", writing)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regenerate(target, prompts, tmp_path / "parts.jsonl", writing, stop)
    with (tmp_path / "parts.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"input_ids": [3')  # a line cut off
    regenerate(target, prompts, tmp_path / "parts.jsonl", writing)
    assert (tmp_path / "parts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
