"""One node budget for a whole batch keeps the best ancestor-closed parts, and never looks at sampled tokens."""

from __future__ import annotations

import random

import pytest
import torch

from specplug import LLM, DraftDistributions, SamplingParams
from specplug.speculation.draft import Draft, trim_drafts
from support.follow import Follow
from support.speculators import provide


def random_tree(chooser: random.Random, size: int, *, scored: bool) -> Draft:
    parents = [chooser.randint(-1, node - 1) for node in range(size)]
    scores: list[float] = []
    for parent in parents:
        scores.append((0.0 if parent < 0 else scores[parent]) - chooser.random())
    return Draft("m", [chooser.randrange(9) for _ in range(size)], parents, scores if scored else None)


def test_the_best_nodes_of_all_rows_stay_and_are_trees() -> None:
    chooser = random.Random(0)
    for _ in range(300):
        drafts = [random_tree(chooser, chooser.randint(1, 12), scored=True) for _ in range(chooser.randint(1, 5))]
        total = chooser.randint(0, 30)
        trimmed = trim_drafts(drafts, total)
        everything = sorted((score for draft in drafts for score in draft.scores or []), reverse=True)
        kept = sorted((score for draft in trimmed if draft for score in draft.scores or []), reverse=True)
        assert kept == everything[:total]
        for draft in trimmed:
            assert draft is not None
            assert all(parent < node for node, parent in enumerate(draft.parent_list()))


def test_drafts_without_scores_lose_their_last_nodes_whatever_the_tokens() -> None:
    chooser = random.Random(1)
    for _ in range(100):
        chain = Draft("m", [chooser.randrange(9) for _ in range(8)])
        tree = random_tree(chooser, 10, scored=False)
        other = random_tree(chooser, 6, scored=True)
        trimmed = trim_drafts([chain, None, tree, other], 12)
        assert [None if draft is None else len(draft) for draft in trimmed] == [4, None, 4, 4]
        assert trimmed[0] is not None
        assert trimmed[0].tokens == chain.tokens[:4]
        assert trimmed[2] is not None
        assert trimmed[2].tokens == tree.tokens[:4]
        assert trimmed[2].parents == (tree.parents or [])[:4]


def test_a_total_below_the_number_of_rows_is_used_in_turn() -> None:
    drafts = [Draft("m", [1, 2, 3]), None, Draft("m", [4]), Draft("m", [5, 6])]
    for total in range(6):
        sizes = [[len(d) for d in trim_drafts(drafts, total, turn) if d is not None] for turn in range(3)]
        assert all(sum(each) <= total for each in sizes)
        if total < 3:
            assert all(sum(each) == total for each in sizes)
            assert [sum(row) for row in zip(*sizes, strict=True)] == [total] * 3


def test_what_fits_is_left_alone() -> None:
    draft = Draft("m", [1, 2, 3])
    assert trim_drafts([draft, None], 3) == [draft, None]


def test_how_many_tokens_a_sampled_draft_came_with_does_not_decide_what_is_kept() -> None:
    """A draft that stops after a token that was drawn would else be kept to the end just because that token was drawn."""
    probs = DraftDistributions(torch.full((4, 2), 0.5))
    other = Draft("m", [1], probs=probs, allowed=4)
    for total in range(2, 9):
        kept = []
        for length in range(1, 5):
            trimmed = trim_drafts([other, Draft("m", [1] * length, probs=probs, allowed=4)], total)[1]
            assert trimmed is not None
            kept.append(len(trimmed))
        assert kept == [min(length, total // 2) for length in range(1, 5)]


def test_how_far_a_sampled_draft_is_cut_depends_on_no_rows_length() -> None:
    """Another row's draft may go on as long as a sampled one does, which depends on what was drawn."""
    probs = DraftDistributions(torch.full((8, 9), 1 / 9))
    kept = set()
    for length in range(1, 9):
        sampled, greedy = Draft("m", [1] * 8, probs=probs, allowed=8), Draft("m", [1] * length, allowed=8)
        for drafts in ([sampled, greedy], [greedy, sampled]):
            trimmed = trim_drafts(drafts, 12)[drafts.index(sampled)]
            assert trimmed is not None
            kept.add(len(trimmed))
    assert kept == {6}


@pytest.mark.engine
def test_fewer_draft_tokens_than_rows_reach_all_rows() -> None:
    prompts = [[5, 6, place] for place in range(3, 7)]
    params = SamplingParams(temperature=0, max_tokens=13, ignore_eos=True)
    follow = Follow([])
    options = provide(lambda c, t: follow, gamma=4)
    with LLM(
        "tiny", memory="256MiB", max_model_len=64, skip_tokenizer_init=True, max_num_draft_tokens=2, **options
    ) as llm:
        plain = llm.generate(prompts, params)
        follow.known += [each.prompt_token_ids + each.outputs[0].token_ids for each in plain]
        outputs = llm.generate(prompts, params)
    assert [each.outputs[0].token_ids for each in outputs] == [each.outputs[0].token_ids for each in plain]
    assert all(each.outputs[0].metrics.num_accepted_draft_tokens >= 2 for each in outputs)
