"""Runs an engine through what rows can go through, accepts and rejects at random, and keeps every draft."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug.contract.types import Proposal, ProposalBatch
from specplug.contract.verification import Verdict
from specplug.plugins.registry import RegisteredSpeculator
from specplug.sampling.params import SamplingParams
from specplug.speculation.draft_length import FixedDraftLength
from specplug.speculation.row import Row
from specplug.speculation.target_states.ring_buffer import WINDOW
from specplug.testing.reference import DraftRecord, row_drafts
from specplug.testing.session import Session
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt


class RandomAcceptance:
    """A verifier that accepts drafts at random and continues with a random token; it is not lossless.

    Each row copies itself from some distance for a while, then goes on at random for a while: so methods that look for
    many tokens in a row find some, and drafts for what is new are asked for too.
    """

    def __init__(self, seed: int, vocabulary: int, go_on: float = 0.75) -> None:
        self.random = random.Random(seed)
        self.vocabulary = vocabulary
        self.go_on = go_on
        self.depths: list[int] = []
        self._copies: dict[int, tuple[int, int]] = {}

    def __call__(self, requests: Sequence[Row], offsets: Sequence[int], logits: torch.Tensor) -> Verdict:
        """Decides at random."""
        accepted, following = [], []
        for request in requests:
            path: list[int] = []
            if request.draft is not None:
                parents = request.draft.parent_list()
                while self.random.random() < self.go_on:
                    at = path[-1] if path else -1
                    below = [node for node, parent in enumerate(parents) if parent == at]
                    if not below:
                        break
                    path.append(self.random.choice(below))
                self.depths.append(len(path))
            accepted.append(path)
            walked = [] if request.draft is None else [int(request.draft.tokens[node]) for node in path]
            following.append(self._next(request, walked))
        return Verdict(accepted, following)

    def _next(self, request: Row, walked: Sequence[int]) -> int:
        distance, left = self._copies.get(request.number, (0, 0))
        if not left:
            distance = self.random.choice([0, 2, 3, 5])
            left = self.random.randint(1, 6) if not distance else 4 * distance
        self._copies[request.number] = (distance, left - 1)
        tokens = [*request.tokens[-9:], *walked]
        if 0 < distance <= len(tokens):
            return tokens[-distance]
        return self.random.choice([*tokens[-9:], *(self.random.randrange(self.vocabulary) for _ in range(6))])


class RestlessPolicy(FixedDraftLength):
    """Varies budgets, and lets rows sleep for a while, some longer than target states are kept."""

    def __init__(self, seed: int, limit: int, sleep: float = 0.05) -> None:
        self.random = random.Random(seed)
        self.limit = limit
        self.sleep = sleep
        self.asleep: dict[int, int] = {}
        self.naps = 0

    def length_of(self, request: Row, speculator: RegisteredSpeculator) -> int | None:
        """See `FixedDraftLength.length_of`."""
        left = self.asleep.get(request.number, 0)
        if left:
            self.asleep[request.number] = left - 1
            return None
        if self.random.random() < self.sleep:
            self.asleep[request.number] = self.random.choice([1, 2, 7, WINDOW + 5])
            self.naps += 1
        return self.random.choice([0, self.limit, self.limit, self.limit, self.random.randint(0, self.limit)])


class Recorder:
    """Keeps what is drafted for every row, and what the speculator had been shown of it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.records: list[DraftRecord] = []
        self.forks = 0
        self._shown: dict[int, range] = {}
        self._forked: set[int] = set()
        chain = session.engine.chain
        self._fork, self._end = chain.fork, chain.end
        chain.fork, chain.end = self._on_fork, self._on_end  # type: ignore[method-assign]
        session.around_propose(self._propose)

    def _on_fork(self, parent: Row, child: Row) -> None:
        shown = self._shown.get(parent.number)
        if shown is not None:
            self._shown[child.number] = range(shown.start, min(shown.stop, child.num_forked_tokens))
            self._forked.add(child.number)
        self._fork(parent, child)

    def _on_end(self, request: Row, slot: int, reason: Any) -> None:
        self._shown.pop(request.number, None)
        self._forked.discard(request.number)
        self._end(request, slot, reason)

    def _propose(self, batch: ProposalBatch, call: Callable[[], Proposal | None]) -> Proposal | None:
        requests = [self.session.request_of(row) for row in batch.rows]
        for row, request in zip(batch.rows, requests, strict=True):
            shown = self._shown.get(request.number, range(0, 0))
            self.forks += row.forked_from is not None
            start = shown.start if row.new_positions.start == shown.stop else row.new_positions.start
            if row.num_cached_tokens:
                start = 0
            self._shown[request.number] = range(start, row.new_positions.stop)
        budgets = [row.budget for row in batch.rows]
        tokens = [list(row.tokens) for row in batch.rows]
        proposal = call()
        try:
            drafts = row_drafts(proposal, len(batch.rows), self.session.vocabulary)
        except Exception:  # a proposal that breaks the contract is counted by the engine, and is another check's
            return proposal
        for index, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
            if budgets[index].max_nodes:
                begin, forked = self._shown[request.number].start, request.number in self._forked
                self.records.append(
                    DraftRecord(request.number, tokens[index], begin, forked, budgets[index], request.params, draft)
                )
        return proposal


@attrs.define(eq=False)
class Drive:
    """The result of a drive.

    Attributes:
        records: every draft.
        depths: how deep each random walk went.
        steps: of the engine.
        naps: how often a row fell asleep.
        forks: rows that began as forks.
        preemptions: rows that lost their blocks.
        aborts: requests that were aborted.
        faults: of the speculator.
    """

    records: list[DraftRecord]
    depths: list[int]
    steps: int
    naps: int = 0
    forks: int = 0
    preemptions: int = 0
    aborts: int = 0
    faults: int = 0


def mixed_params(number: int, length: int, **changes: Any) -> SamplingParams:
    """Greedy and sampled requests in turn."""
    return SamplingParams(temperature=(0.0, 0.8)[number % 2], max_tokens=length, ignore_eos=True, **changes)


def drive_rollbacks(subject: Subject, folder: Path, seed: int) -> Drive:
    """Rows that stay from beginning to end, while drafts are accepted and rejected at random."""
    rows = 6
    with subject.start(
        folder, max_num_seqs=rows, max_num_batched_tokens=512, block_size=4, max_model_len=260
    ) as session:
        recorder = Recorder(session)
        acceptance = RandomAcceptance(seed, session.vocabulary)
        session.take_over_verification(acceptance)
        for number in range(rows):
            prompt = repetitive_prompt(2 + 9 * number, session.vocabulary, seed + number)
            session.add(prompt, mixed_params(number, subject.scaled(110, 50)))
        steps = session.finish()
        faults = session.engine.chain.faults[session.speculator.method]
    return Drive(recorder.records, acceptance.depths, steps, faults=faults)


def drive_rows(subject: Subject, folder: Path, seed: int) -> Drive:
    """Rows that are chunked, put to sleep, forked, preempted and aborted, in slots that are used again and again."""
    chooser = random.Random(seed)
    sizes: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 120, "block_size": 4, "max_model_len": 260}
    aborts = 0
    with subject.start(folder, **sizes) as session:
        engine = session.engine
        recorder = Recorder(session)
        acceptance = RandomAcceptance(seed, session.vocabulary)
        session.take_over_verification(acceptance)
        policy = RestlessPolicy(seed, session.speculator.config.num_speculative_tokens)
        engine.chain.policy = policy
        longest = 125 + 70 + max(session.speculator.scratch_tokens_per_row, 40)
        session.limit_blocks(longest + 100)
        for number in range(subject.scaled(18, 11)):
            prompt = repetitive_prompt((30, 3, 90, 1, 125)[number % 5], session.vocabulary, seed + number)
            session.add(prompt, mixed_params(number, (30, 60, 4, 45)[number % 4], n=(3, 1, 1)[number % 3]))

        def disturb(step: int) -> None:
            nonlocal aborts
            if chooser.random() < 0.02 and (alive := list(engine.scheduler.requests())):
                engine.abort(chooser.choice(alive).id)
                aborts += 1

        steps = session.finish(disturb)
        faults = engine.chain.faults[session.speculator.method]
        preemptions = engine.scheduler.num_preemptions
    return Drive(recorder.records, acceptance.depths, steps, policy.naps, recorder.forks, preemptions, aborts, faults)
