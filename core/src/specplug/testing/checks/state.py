"""State: a draft depends on the row's tokens, not on how the row came to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from specplug.contract.types import Proposal, ProposalBatch
from specplug.contract.verification import Verdict
from specplug.plugins.registry import RegisteredSpeculator
from specplug.request import Request
from specplug.sampling.params import SamplingParams
from specplug.speculation.draft_length import FixedDraftLength
from specplug.speculation.row import Row
from specplug.testing.check import Check
from specplug.testing.driver import Drive, drive_rollbacks, drive_rows
from specplug.testing.failures import CheckFailure, NotApplicable, expect_drafts
from specplug.testing.reference import RowDraft, allowed_differences, choose, compare, difference, row_drafts
from specplug.testing.subject import Subject
from specplug.testing.targets import repetitive_prompt


def rollback(subject: Subject) -> str:
    """Many random accepts and rejects, then the same tokens to a fresh speculator."""
    if subject.learns:
        raise NotApplicable("its drafts may depend on other requests, as traits.learns says")
    folder = subject.targets.get()
    drive: Drive = subject.remember("rollbacks 0", lambda: drive_rollbacks(subject, folder, seed=0))
    chosen = choose(drive.records, subject.scaled(150, 60), seed=1)
    result = compare(subject, folder, chosen)
    if len(result.wrong) > allowed_differences(result.compared):
        raise CheckFailure(
            "after accepts and rejects the drafts of a fresh speculator for the same tokens "
            "(entries of rejected drafts are overwritten, accepted ones are neither skipped nor run twice, "
            "states[i] is paired with token i; one whose drafts depend on other requests declares traits.learns)",
            result.first_difference(),
        )
    if result.compared and result.random == result.compared:
        raise NotApplicable("its drafts are random and report no probabilities: there is nothing to compare")
    expect_drafts(sum(len(record.draft.tokens) for record in chosen))
    deep = sum(depth >= 2 for depth in drive.depths)
    return f"{result.compared} drafts alike, after {len(drive.depths)} random walks, {deep} of them two or more deep"


ROLLBACK = Check(
    "rollback",
    "after accepts and rejects it drafts what a fresh speculator drafts",
    "No stale KV entry, no skipped or repeated position, no hidden state paired with the wrong token.",
    "Entries of rejected drafts are stale: count how many were accepted (`row.outcome`), and store the rest again.",
    rollback,
)


def rows(subject: Subject) -> str:
    """Everything that rows can go through, then the same tokens to a fresh speculator."""
    if subject.learns:
        raise NotApplicable("its drafts may depend on other requests, as traits.learns says")
    folder = subject.targets.get()
    drive = drive_rows(subject, folder, seed=3)
    with subject.start(folder) as session:
        traits = session.speculator.traits
        caches = [region for region in session.regions() if region.layers]
    shares = traits.token_only or (bool(caches) and all(region.tables == "shared" for region in caches))
    records = [record for record in drive.records if shares or not record.forked]
    chosen = choose(records, subject.scaled(150, 60), seed=1)
    result = compare(subject, folder, chosen)
    if len(result.wrong) > allowed_differences(result.compared):
        raise CheckFailure(
            "the drafts of a fresh speculator for the same tokens (forget batch.ended first, drop what is kept for the row_id "
            "of a row with is_new, begin at new_positions.start, continue a fork only from shared KV; one whose drafts "
            "depend on other requests declares traits.learns)",
            result.first_difference(),
        )
    if result.compared and result.random == result.compared:
        raise NotApplicable("its drafts are random and report no probabilities: there is nothing to compare")
    expect_drafts(sum(len(record.draft.tokens) for record in chosen))
    return (
        f"{result.compared} drafts alike, {drive.naps} naps, {drive.forks} forks, {drive.preemptions} preemptions, "
        f"{drive.aborts} aborts in {drive.steps} steps"
    )


ROWS = Check(
    "rows",
    "reused row ids, aborts, forks, preemption and sleeping rows leave no trace",
    "What is kept of a row belongs to that row, from its beginning to its end.",
    "Handle `batch.ended` before `batch.rows`; drop what you kept when `row.is_new`; start at `row.new_positions.start`.",
    rows,
)


_LENGTH = 90
_TEXTS = 2
_CHUNK = 16
_CALM_END = 14  # the last tokens of a request come one by one, so that the same of them are shown in both engines
Drafts = dict[tuple[int, int, int, int], RowDraft]


def learning(subject: Subject) -> str:
    """The same requests to two fresh engines: in one undisturbed, in the other chunked, asleep, accepted and preempted."""
    if not subject.learns:
        raise NotApplicable("it does not learn from requests: traits.learns is not set")
    folder = subject.targets.get()
    calm, _ = _learn_and_draft(subject, folder, seed=31, restless=False)
    other, disturbances = _learn_and_draft(subject, folder, seed=31, restless=True)
    common = sorted(calm.keys() & other.keys())
    wrong = [key for key in common if difference(calm[key], other[key])]
    if len(wrong) > allowed_differences(len(common)):
        again, _ = _learn_and_draft(subject, folder, seed=32, restless=False)
        unstable = sum(bool(difference(calm[key], again[key])) for key in common if key in again)
        if unstable > allowed_differences(len(common)):
            raise NotApplicable("its drafts are random and report no probabilities: there is nothing to compare")
        one, two = calm[wrong[0]], other[wrong[0]]
        raise CheckFailure(
            "the same drafts after the same requests, whether they were served undisturbed or in chunks, with sleeping rows, "
            "preemption and accepted drafts (states[i] belongs to token i, every position is learned once, "
            "ended rows are dropped)",
            f"{len(wrong)} of {len(common)} drafts differ; the first: {one.paths[:4]} and {two.paths[:4]}",
        )
    expect_drafts(sum(len(calm[key].tokens) for key in common))
    return f"{len(common)} drafts alike in two engines, one of them with {disturbances} naps and preemptions"


class _Naps(FixedDraftLength):
    """Lets a row sleep now and then, never for longer than target states are kept."""

    def __init__(self, seed: int, limit: int, may_rest: Callable[[Row], bool]) -> None:
        self._random = random.Random(seed)
        self._limit = limit
        self._may_rest = may_rest
        self._left = 0
        self.count = 0

    def length_of(self, request: Row, speculator: RegisteredSpeculator) -> int | None:
        """See `FixedDraftLength.length_of`."""
        if self._left:
            self._left -= 1
            return None
        if self._may_rest(request) and self._random.random() < 0.15:
            self._left = self._random.choice([0, 1, 4])
            self.count += 1
            return None
        return self._limit


def _learn_and_draft(subject: Subject, folder: Path, seed: int, *, restless: bool) -> tuple[Drafts, int]:
    """Serves requests one after the other, so that they end in the same order; gives the drafts for the last of them."""
    drafts: Drafts = {}
    scripts: dict[int, list[int]] = {}
    chooser = random.Random(seed)
    disturbed = False
    options: dict[str, Any] = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": _CHUNK if restless else 2 * _LENGTH,
        "block_size": 4,
    }
    with subject.start(folder, max_model_len=2 * _LENGTH, seed=seed, **options) as session:
        engine = session.engine

        def left(request: Row) -> int:
            return len(scripts[request.number]) - len(request.tokens)

        def may_disturb(request: Row) -> bool:
            return disturbed and left(request) > _CALM_END

        def verify(requests: Sequence[Request], offsets: Sequence[int], logits: torch.Tensor) -> Verdict:
            paths = [_accepted(r, scripts[r.number], left(r) - _CALM_END) if disturbed else [] for r in requests]
            following = [scripts[r.number][len(r.tokens) + len(path)] for r, path in zip(requests, paths, strict=True)]
            return Verdict(paths, following)

        def propose(batch: ProposalBatch, call: Callable[[], Proposal | None]) -> Proposal | None:
            keys = [
                (session.request_of(row).number, len(row.tokens), row.budget.max_nodes, row.budget.max_depth)
                for row in batch.rows
            ]
            proposal = call()
            for key, draft in zip(keys, row_drafts(proposal, len(keys), session.vocabulary), strict=True):
                if probing and key[2]:
                    drafts[key] = draft
            return proposal

        naps = _Naps(seed, session.speculator.config.num_speculative_tokens, may_disturb)
        if restless:
            engine.chain.policy = naps
        session.take_over_verification(verify)
        session.around_propose(propose)

        def preempt(step: int) -> None:
            for request in list(engine.scheduler.running):
                if may_disturb(request) and request.num_output_tokens > 4 and chooser.random() < 0.04:
                    engine.scheduler.preempt(request)

        count = subject.scaled(10, 6)
        for number in range(count):
            probing = number >= count - _TEXTS
            disturbed = restless and not probing
            text = repetitive_prompt(_LENGTH, session.vocabulary, 700 + number % _TEXTS)
            length = 52 + 7 * (number % 3)
            params = SamplingParams(temperature=0, max_tokens=_LENGTH - length, ignore_eos=True)
            (request,) = session.add(text[:length], params)
            scripts[request.number] = text
            session.finish(preempt)
        return drafts, naps.count + engine.scheduler.num_preemptions


def _accepted(request: Request, script: Sequence[int], most: int) -> list[int]:
    """The path of a draft that says what is to come, as far as it may be accepted."""
    path: list[int] = []
    if request.draft is None:
        return path
    parents = request.draft.parent_list()
    while len(path) < most:
        at, wanted = path[-1] if path else -1, script[len(request.tokens) + len(path)]
        below = [n for n, parent in enumerate(parents) if parent == at and int(request.draft.tokens[n]) == wanted]
        if not below:
            break
        path.append(below[0])
    return path


LEARNING = Check(
    "learning",
    "what it learns from requests does not depend on how they were scheduled",
    "A speculator that declares `traits.learns` pairs the right states with the right tokens, in chunks and after sleep, "
    "preemption and accepted drafts too.",
    "Learn from committed tokens and their states alone: each position of `row.new_positions` once, never a draft; one that "
    "also learns from `row.outcome` disagrees with this check by design, and says so where it overrides it.",
    learning,
)
