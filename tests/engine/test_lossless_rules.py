"""Every verification rule alone: up to 200,000 trials over a vocabulary of 16, also with drafts unlike the target."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from specplug import DraftDistributions, Proposal, SamplingParams, TokenView, VerificationBatch, VerificationRow
from specplug.sampling.distributions import DistributionRow, StepDistributions, process
from specplug.sampling.randomness import EngineRandomness, RowRandomness, Stream
from specplug.speculation.verification.verifier import LosslessVerifier
from support.marks import slow_except
from support.statistics import THRESHOLD, worst_p_value

V = 16
TRIALS = 200_000
FEWER_TRIALS = 20_000
FEW_TRIALS = 8_000
ROWS = 4000
SAMPLING = SamplingParams(temperature=0.8, top_p=0.95)


class World:
    """A target and a draft whose distributions depend on the last two tokens."""

    def __init__(self, agreement: float) -> None:
        generator = torch.Generator().manual_seed(3)
        self.logits = torch.randn(V, V, V, generator=generator) * 1.5
        noise = torch.randn(V, V, V, generator=generator) * 1.5
        self.draft = (agreement * self.logits + (1 - agreement) * noise).softmax(-1)
        self.target = process(self.logits.view(-1, V), [SAMPLING] * V * V).view(V, V, V)
        self.rng = torch.Generator().manual_seed(4)

    def joint(self) -> np.ndarray:
        """Exact [V, V, V] probabilities of three tokens after the context (0, 1)."""
        first = self.target[0, 1].double()
        second = self.target[1].double()
        third = self.target.double()
        return (first[:, None, None] * second[:, :, None] * third).numpy()

    def draw(self, contexts: torch.Tensor, count: int = 1) -> torch.Tensor:
        """Draft tokens [N, count] after contexts [N, 2], without replacement, in draw order."""
        return torch.multinomial(self.draft[contexts[:, 0], contexts[:, 1]], count, generator=self.rng)


Maker = Callable[[World, int], tuple[list[list[int]], list[list[int]] | None, list[DraftDistributions] | None]]


def chain(world: World, rows: int, depth: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled chains [rows, depth] and their distributions [rows, depth, V]."""
    context = torch.tensor([[0, 1]]).expand(rows, 2)
    tokens, probs = [], []
    for _ in range(depth):
        probs.append(world.draft[context[:, 0], context[:, 1]])
        token = world.draw(context)
        tokens.append(token)
        context = torch.cat([context[:, 1:], token], dim=1)
    return torch.cat(tokens, dim=1), torch.stack(probs, dim=1)


def deterministic_chain(world: World, rows: int):
    tokens, _ = chain(world, rows)
    return tokens.tolist(), None, None


def deterministic_tree(world: World, rows: int):
    tokens, _ = chain(world, rows, 2)
    wide = [[3, 7, *row, 5] for row in tokens.tolist()]
    return wide, [[-1, -1, -1, 2, 0]] * rows, None


def sampled_chain(world: World, rows: int):
    tokens, probs = chain(world, rows)
    lengths = torch.randint(1, 4, (rows,), generator=world.rng).tolist()
    lists = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
    return lists, None, [DraftDistributions(p[:n]) for p, n in zip(probs, lengths, strict=True)]


def sampled_tree(world: World, rows: int):
    """Three children of the root, two of the first and of the second, all drawn without replacement."""
    root = torch.tensor([[0, 1]]).expand(rows, 2)
    first = world.draw(root, 3)
    below = []
    for branch in range(2):
        context = torch.cat([root[:, 1:], first[:, branch : branch + 1]], dim=1)
        below.append((world.draw(context, 2), world.draft[context[:, 0], context[:, 1]]))
    tokens = torch.cat([first, below[0][0], below[1][0]], dim=1).tolist()
    top = world.draft[0, 1].expand(rows, V)
    values = torch.stack([top, below[0][1], below[1][1]], dim=1)
    probs = [DraftDistributions(row, index=[0, 0, 0, 1, 1, 2, 2]) for row in values]
    return tokens, [[-1, -1, -1, 0, 0, 1, 1]] * rows, probs


def run(
    world: World, make: Maker, rule: str, trials: int, randomness: EngineRandomness | None = None
) -> tuple[np.ndarray, float]:
    """Three emitted tokens per trial [trials, 3], and the mean number of accepted draft tokens."""
    randomness = randomness or EngineRandomness(7, torch.device("cpu"))
    verifier = LosslessVerifier(randomness, rule)
    context = TokenView([0, 1])
    emitted, accepted = [], 0
    for start in range(0, trials, ROWS):
        rows = [
            VerificationRow(0, "test", context, 1, SAMPLING, RowRandomness(randomness, start + i, None))
            for i in range(ROWS)
        ]
        tokens, parents, probs = make(world, ROWS)
        proposal = Proposal(tokens, parents=parents, probs=probs)
        contexts, offsets = [], [0]
        for row, ids in enumerate(tokens):
            parent_of = parents[row] if parents else range(-1, len(ids) - 1)
            states = [(0, 1)]
            for token, parent in zip(ids, parent_of, strict=True):
                states.append((states[parent + 1][1], token))
            contexts.extend(states)
            offsets.append(len(contexts))
        index = torch.tensor(contexts)
        target = StepDistributions(world.logits[index[:, 0], index[:, 1]], offsets, [DistributionRow(SAMPLING)] * ROWS)
        verdict = verifier.verify(VerificationBatch(rows), proposal, target)
        for row in range(ROWS):
            out = [tokens[row][node] for node in verdict.accepted[row]] + [verdict.next_tokens[row]]
            accepted += len(out) - 1
            emitted.append(out[:3])
    return complete(world, emitted), accepted / len(emitted)


def complete(world: World, emitted: list[list[int]]) -> np.ndarray:
    """Continues shorter outputs with the target's own draws, so that the joint of three tokens can be tested."""
    rng = torch.Generator().manual_seed(5)
    samples = torch.zeros(len(emitted), 5, dtype=torch.long)
    samples[:, 1] = 1
    lengths = torch.tensor([len(out) for out in emitted])
    for row, out in enumerate(emitted):
        samples[row, 2 : 2 + len(out)] = torch.tensor(out)
    for position in range(3):
        drawn = torch.multinomial(world.target[samples[:, position], samples[:, position + 1]], 1, generator=rng)[:, 0]
        samples[:, position + 2] = torch.where(lengths > position, samples[:, position + 2], drawn)
    return samples[:, 2:].numpy()


@pytest.mark.parametrize(("agreement", "trials"), slow_except([(0.0, TRIALS), (0.7, FEWER_TRIALS)], 0.7))
@pytest.mark.parametrize(
    ("make", "rule"),
    slow_except(
        [
            (deterministic_chain, "block"),
            (deterministic_tree, "block"),
            (sampled_chain, "standard"),
            (sampled_chain, "block"),
            (sampled_tree, "block"),
        ],
        (deterministic_tree, "block"),
        (sampled_chain, "standard"),
        (sampled_chain, "block"),
        (sampled_tree, "block"),
    ),
)
def test_rule_keeps_the_distribution(make: Maker, rule: str, agreement: float, trials: int) -> None:
    world = World(agreement)
    samples, _ = run(world, make, rule, trials)
    assert worst_p_value(samples, world.joint()) > THRESHOLD


@pytest.mark.parametrize(("trials", "every"), slow_except([(TRIALS, 100), (FEWER_TRIALS, 28)], FEWER_TRIALS))
def test_a_small_bias_is_seen(trials: int, every: int) -> None:
    """One percent with all trials, 3.6 percent with the fewer ones."""
    world = World(0.7)
    samples, _ = run(world, sampled_chain, "block", trials)
    biased = samples.copy()
    biased[::every, 1] = 3
    assert worst_p_value(biased, world.joint()) < THRESHOLD


def test_shared_randomness_is_seen() -> None:
    """A draft drawn with the very number that decides its acceptance: the classic silent bug of wide vocabularies."""
    world = World(0.7)
    randomness = EngineRandomness(7, torch.device("cpu"))
    acceptance = randomness.generator(Stream.ACCEPTANCE)

    def cheating(world: World, rows: int):
        peek = torch.Generator()
        peek.set_state(acceptance.get_state())
        uniform = torch.rand(rows, 1, generator=peek)
        probs = world.draft[0, 1]
        tokens = torch.searchsorted(probs.cumsum(0), uniform).clamp_max(V - 1)
        return tokens.tolist(), None, [DraftDistributions(probs[None])] * rows

    samples, _ = run(world, cheating, "standard", FEWER_TRIALS, randomness)
    assert worst_p_value(samples, world.joint()) < THRESHOLD


def test_block_verification_accepts_at_least_as_much_as_standard() -> None:
    world = World(0.7)
    _, standard = run(world, sampled_chain, "standard", FEW_TRIALS)
    world = World(0.7)
    _, block = run(world, sampled_chain, "block", FEW_TRIALS)
    assert block > standard


def test_sampled_siblings_beat_one_child() -> None:
    _, wide = run(World(0.7), sampled_tree, "block", FEW_TRIALS)
    _, narrow = run(World(0.7), sampled_chain, "block", FEW_TRIALS)
    assert wide > narrow


def test_perfect_drafts_are_all_accepted() -> None:
    world = World(1.0)
    world.draft = world.target
    _, mean = run(world, lambda w, rows: full_chain(w, rows), "block", FEW_TRIALS)
    assert mean > 2.999
    _, mean = run(world, lambda w, rows: full_chain(w, rows), "standard", FEW_TRIALS)
    assert mean > 2.999


def full_chain(world: World, rows: int):
    tokens, probs = chain(world, rows)
    return tokens.tolist(), None, [DraftDistributions(row) for row in probs]
