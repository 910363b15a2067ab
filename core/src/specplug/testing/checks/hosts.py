"""Hosts: in an engine that is not specplug's, a speculator drafts as it does in specplug's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch

from specplug.contract.types import Proposal, ProposalBatch
from specplug.errors import SpecplugError
from specplug.host import ArrayTokens, HostLimits, HostRow, SpeculatorHost, TargetFacade
from specplug.model.load.checkpoint import load_config
from specplug.model.load.tokenizer import load_tokenizer
from specplug.testing.check import Check
from specplug.testing.driver import RandomAcceptance, mixed_params
from specplug.testing.failures import CheckFailure, NotApplicable, describe, expect_drafts
from specplug.testing.reference import DraftRecord, allowed_differences, choose, compare, row_drafts
from specplug.testing.subject import Subject, kept_randomness, one_thread, quiet
from specplug.testing.targets import repetitive_prompt

_ROWS = 4
_LENGTH = 160
_BATCHED = 512
_FREE = -1  # what the array holds where no row is: no token, so a draft from there is noticed


def hosts(subject: Subject) -> str:
    """Rows that come and go in one array of an engine without target states and block tables; then as in `rows`."""
    folder = subject.targets.get()
    config = {key: value for key, value in subject.config(folder).items() if key != "fallback"}
    _check_applies(subject, folder, config)
    with quiet(), kept_randomness(), one_thread():
        engine = _Engine(subject, folder, config)
        try:
            engine.run(subject.scaled(16, 9))
        except SpecplugError as error:
            raise CheckFailure(
                "no fault in an engine that is not specplug's: row.tokens may be a view of an array, row.table is None",
                describe(error),
            ) from error
        finally:
            engine.host.close()
    drafted, calls = sum(len(record.draft.tokens) for record in engine.records), len(engine.records)
    expect_drafts(drafted)
    if subject.learns:
        return f"{calls} drafts for {engine.count} rows without a fault"
    result = compare(subject, folder, choose(engine.records, subject.scaled(100, 40), seed=1))
    if len(result.wrong) > allowed_differences(result.compared):
        raise CheckFailure(
            "in an engine that is not specplug's the drafts of a fresh speculator for the same tokens (keep no view of a row "
            "that has ended: its array is used again)",
            result.first_difference(),
        )
    return (
        f"{calls} drafts for {engine.count} rows without a fault, {result.compared - result.random} compared and alike"
    )


def _check_applies(subject: Subject, folder: Path, config: Mapping[str, Any]) -> None:
    with subject.start(folder, config=config) as session:
        speculator = session.speculator
        if speculator.overrides_verify:
            raise NotApplicable("it has a verify of its own, which only specplug's own engine calls")
        if speculator.traits.needs_states:
            raise NotApplicable("it reads target states, which other engines may not deliver")
        if any(region.layers and region.tables == "shared" for region in session.regions(shares_tables=False)):
            raise NotApplicable("it plans a KV cache with tables='shared' where an engine has none to share")


@attrs.define(eq=False)
class _Place:
    """A row and its part of the array."""

    row: HostRow
    tokens: ArrayTokens
    end: int


class _Engine:
    """Keeps the tokens of all rows in one array, as vLLM does, and accepts at random. Nothing is computed."""

    def __init__(self, subject: Subject, folder: Path, config: Mapping[str, Any]) -> None:
        self.vocabulary = subject.targets.vocabulary(folder)
        self.array = np.full((_ROWS, _LENGTH), _FREE, dtype=np.int32)
        self.records: list[DraftRecord] = []
        self.count = 0
        self._places: dict[int, _Place] = {}
        self._accept = RandomAcceptance(5, self.vocabulary)
        target = _target_of(subject, folder)
        limits = HostLimits(
            vocab_size=self.vocabulary,
            max_model_len=_LENGTH,
            max_num_seqs=_ROWS,
            max_num_batched_tokens=_BATCHED,
        )
        self.host = SpeculatorHost(
            config,
            limits,
            target=target,
            plugins=subject.plugins,
            allowed=subject.allowed_plugins(config),
            strict=True,
        )
        (speculator,) = self.host.speculators
        self._call = speculator.propose
        speculator.propose = self._propose

    def _propose(self, batch: ProposalBatch) -> Proposal | None:
        """Asks the speculator, and keeps what it drafts."""
        rows = {place.row.slot: place.row for place in self._places.values()}
        tokens = [list(row.tokens) for row in batch.rows]
        budgets = [row.budget for row in batch.rows]
        proposal: Proposal | None = self._call(batch=batch)
        for row, seen, budget, draft in zip(
            batch.rows, tokens, budgets, row_drafts(proposal, len(batch.rows), self.vocabulary), strict=True
        ):
            if budget.max_nodes:
                own = rows[row.row_id]
                self.records.append(DraftRecord(own.number, seen, 0, False, budget, own.params, draft))
        return proposal

    def run(self, rows: int) -> None:
        """Serves rows until all have ended."""
        while self._places or self.count < rows:
            for number in range(_ROWS):
                if number not in self._places and self.count < rows:
                    self._places[number] = self._begin(number)
            self.host.propose([place.row for place in self._places.values()])
            ended = [number for number, place in self._places.items() if not self._step(number, place)]
            for number in ended:
                self.host.end(self._places.pop(number).row, "aborted" if number % 2 else "finished")
            if ended:
                self.host.propose([])
                self.array[ended] = _FREE

    def _begin(self, number: int) -> _Place:
        prompt = repetitive_prompt((3, 40, 17)[self.count % 3], self.vocabulary, 300 + self.count)
        self.array[number, : len(prompt)] = prompt
        view = ArrayTokens(self.array[number], len(prompt))
        length = (50, 9, 1, 30)[self.count % 4]
        self.count += 1
        params = mixed_params(self.count, length)
        return _Place(self.host.add(view, sampling=params), view, len(prompt) + length)

    def _step(self, number: int, place: _Place) -> bool:
        """Commits what is accepted of a row's draft, and a token more; returns whether the row goes on."""
        row = place.row
        verdict = self._accept([row], [0], torch.empty(0, dtype=torch.float32, device="cpu"))
        path = verdict.accepted[0]
        drafted = [] if row.draft is None else [int(row.draft.tokens[node]) for node in path]
        begin = len(row.tokens)
        new = [*drafted, int(verdict.next_tokens[0])][: place.end - begin]
        self.array[number, begin : begin + len(new)] = new
        row.advance(begin + len(new), path[: len(new)])
        return len(row.tokens) < place.end


def _target_of(subject: Subject, folder: Path) -> TargetFacade:
    config = load_config(folder)
    text = config.get_text_config()
    target = TargetFacade.of_limits(
        vocab_size=subject.targets.vocabulary(folder),
        max_model_len=_LENGTH,
        max_num_seqs=_ROWS,
        max_num_batched_tokens=_BATCHED,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        source=subject.source(folder),
        config=config,
        tokenizer=lambda: load_tokenizer(folder),
    )
    target.attach(subject.targets.reference(folder))
    return target


HOSTS = Check(
    "hosts",
    "in an engine that is not specplug's it drafts as in specplug's own",
    "It uses nothing but what every engine gives, so that it runs inside vLLM too.",
    "Use `row.tokens` as a sequence, which may be a view of an array; keep no view of a row that has ended; expect that "
    "`row.table` is None, and calls without rows; plan KV caches with `tables='own'` where `budget.shares_tables` is false.",
    hosts,
)
