"""The engine: one step reads schedule → target forward → verify → commit → propose."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from typing import Any

import attrs
import torch

from specplug.config.engine import EngineConfig
from specplug.contract.types import Outcome, Verdict
from specplug.engine.intake import Intake
from specplug.engine.scheduler import ScheduledRow, Scheduler
from specplug.engine.turns import Turns
from specplug.engine.verification import Verification
from specplug.errors import RequestError
from specplug.memory.plan import MemoryPlan
from specplug.model.device import to_device
from specplug.model.forward import ForwardRow, TreeMask
from specplug.model.kv_cache import KVCache
from specplug.model.runner import ModelRunner
from specplug.model.torch_state import own_torch_state
from specplug.plugins.registry import PluginRegistry
from specplug.request import Request
from specplug.sampling.distributions import top_probs
from specplug.sampling.logprobs import gather_logprobs
from specplug.sampling.params import SamplingParams
from specplug.sampling.workspace import Workspace
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.state_ring import Captured, Channel
from specplug.speculation.states import TOP_IDS, TOP_PROBS, StateStore
from specplug.stats import SpeculationStats

CLOSED = "the engine was closed while the request was under way"


@attrs.frozen(eq=False)
class StepOutput:
    """What one step did for one request: the tokens it committed, who drafted each, and the text each completes."""

    request: Request
    new_tokens: list[int]
    sources: list[str | None]
    texts: list[str]


@attrs.frozen(eq=False)
class _TargetStep:
    """A target forward over the scheduled rows.

    Attributes:
        rows: the scheduled rows.
        first: for each row, the packed index of its first token.
        sampling: those of `rows` that produce a token.
        offsets: for each sampling row, its first entry in the logits; one more at the end.
        logits: [entries, vocabulary].
        scored: (request, entry of its first scored prompt position, positions) where prompt log-probabilities are wanted.
        captured: the states that speculators asked for, over the packed batch.
    """

    rows: list[ScheduledRow]
    first: list[int]
    sampling: list[ScheduledRow]
    offsets: list[int]
    logits: torch.Tensor
    scored: list[tuple[Request, int, int]]
    captured: Captured


class Engine:
    """Runs requests in batches, speculatively and losslessly. Made by `specplug.engine.startup.start_engine`.

    Its methods may be called from any thread; one works on it at a time, see `Turns`.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        plan: MemoryPlan,
        runner: ModelRunner,
        shared_caches: Sequence[KVCache],
        registry: PluginRegistry,
        chain: SpeculatorChain,
        states: StateStore,
        intake: Intake,
        workspace: Workspace,
        scheduler: Scheduler,
        closers: Sequence[Any],
    ) -> None:
        self.config = config
        self.plan = plan
        self.runner = runner
        self.registry = registry
        self.chain = chain
        self.scheduler = scheduler
        self.stats = SpeculationStats()
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._shared_caches = list(shared_caches)
        self._states = states
        self._intake = intake
        self._verification = Verification(
            registry, chain.speculators, workspace, runner.architecture.vocab_size, strict=config.strict
        )
        self._closers = list(closers)
        self._turns = Turns()
        self._outputs: list[StepOutput] = []
        self.is_closed = False
        self._process = os.getpid()

    # ---- requests -------------------------------------------------------------------------------------------------

    def add_request(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> list[Request]:
        """Queues a request; with `n` completions, the others are forked from the first once its prompt is computed.

        Raises:
            RequestError: the request can never be served; the message says why.
        """
        family = self.make_request(request_id, prompt_ids, params)
        self.submit([family])
        return family

    def make_request(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> list[Request]:
        """The sequences of a request, checked and not queued; never waits for a step.

        Raises:
            RequestError: the request can never be served; the message says why.
        """
        self._check_open()
        with own_torch_state():
            return self._intake.make(request_id, prompt_ids, params)

    def submit(self, families: Sequence[list[Request]]) -> None:
        """Queues requests, all at once."""
        with self._turns:
            self._check_open()
            for family in families:
                self.scheduler.add(family[0])
                self.num_prompt_tokens += family[0].num_prompt_tokens

    def abort(self, *request_ids: str) -> list[Request]:
        """Ends all sequences of requests; returns those that were alive."""
        with self._turns:
            return self._abort(set(request_ids))

    def abandon(self, *request_ids: str) -> None:
        """Aborts requests without waiting for a step that is under way; for finalisers."""
        self._turns.later(lambda: self._abort(set(request_ids)))

    def _abort(self, request_ids: Collection[str], error: str | None = None) -> list[Request]:
        ended = []
        for request in list(self.scheduler.requests()):
            if request.id not in request_ids:
                continue
            if not request.is_finished:
                request.error = error
                request.end("abort")
                ended.append(request)
                if request.call is not None:
                    request.call.woken.set()
            request.fork_group = []
            self.scheduler.finish(request, "aborted")
        return ended

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work

    # ---- the step -------------------------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """Advances every scheduled row; returns what was committed for each that produced tokens, or failed.

        What goes wrong for one row ends that row alone, with the reason in `request.error`. Anything else that goes wrong is
        raised; what was committed then stays, and the rows go on at the next step.
        """
        with self._turns, own_torch_state():
            self._check_open()
            try:
                self._advance()
            except BaseException:
                self._recover()
                raise
            finally:
                for output in self._outputs:
                    if output.request.call is not None:
                        output.request.call.add(output)
                outputs, self._outputs = self._outputs, []
            return outputs

    def _advance(self) -> None:
        rows = self.scheduler.schedule()
        if not rows:
            return
        started = time.perf_counter()
        target = self._forward(rows)
        verdict = self._verification.verify(
            [row.request for row in target.sampling], target.offsets, target.logits[: target.offsets[-1]]
        )
        self._commit(target, verdict)
        self.chain.observe(
            [row.request for row in rows],
            time.perf_counter() - started,
            decoding=all(row.samples and row.num_tokens == 1 for row in rows),
        )
        self._propose(rows)
        self.num_steps += 1

    def _recover(self) -> None:
        """A step was cut short, anywhere: whatever rows had in the cache is computed anew, and nobody's tokens are lost."""
        for request in reversed(list(self.scheduler.running)):  # each goes to the head of the queue
            if request.is_finished:
                self._finish(request)
            else:
                self.scheduler.preempt(request)

    def _forward(self, rows: list[ScheduledRow]) -> _TargetStep:
        """Runs pending tokens and drafts of every row; logits are computed where they are needed and nowhere else."""
        forward_rows: list[ForwardRow] = []
        first: list[int] = []
        sampling: list[ScheduledRow] = []
        offsets = [0]
        logits_index: list[int] = []
        scored: list[tuple[Request, int, int]] = []
        packed = 0
        for row in rows:
            request = row.request
            assert request.table is not None
            start, draft = request.num_computed, request.draft
            tokens = request.tokens[start : start + row.num_tokens]
            tree = None
            if draft is not None:
                tokens += draft.tokens
                if draft.parents is not None:
                    tree = TreeMask.from_parents(start, draft.parents)
            first.append(packed)
            forward_rows.append(ForwardRow(tokens, start, request.table, tree))
            if row.samples:
                sampling.append(row)
                logits_index.extend(range(packed + row.num_tokens - 1, packed + len(tokens)))
                offsets.append(len(logits_index))
            packed += len(tokens)
        for row, begin in zip(rows, first, strict=True):
            if missing := row.request.num_missing_prompt_logprobs:
                skipped = len(row.request.prompt_logprobs) - row.request.num_computed
                count = min(missing, row.num_tokens - skipped)
                if count <= 0:  # computed anew after a preemption
                    continue
                scored.append((row.request, len(logits_index), count))
                logits_index.extend(range(begin + skipped, begin + skipped + count))
        wants_top_k = TOP_IDS in self._states.specs
        logits = self.runner.forward(forward_rows, None if wants_top_k else logits_index, lasting=False)
        captured: dict[Channel, torch.Tensor] = {**self.runner.taps.captured}
        if wants_top_k:
            ids, probs = top_probs(logits, self._states.specs[TOP_IDS].width)
            captured |= {TOP_IDS: ids, TOP_PROBS: probs}
            logits = logits[to_device(logits_index or [0], logits.device)]
        return _TargetStep(rows, first, sampling, offsets, logits, scored, captured)

    def _commit(self, target: _TargetStep, verdict: Verdict) -> None:
        """Appends accepted tokens, makes their KV contiguous, and ends rows that are done."""
        moves: list[tuple[int, int]] = []
        final: dict[int, tuple[range, list[int]]] = {}
        drafted: dict[int, range] = {}
        decisions = iter(zip(verdict.accepted, verdict.next_tokens, target.offsets, strict=False))
        self._score_prompts(target)
        for row, first in zip(target.rows, target.first, strict=True):
            request = row.request
            start = request.num_computed
            packed = list(range(first, first + row.num_tokens))
            path, next_token, entry = next(decisions) if row.samples else ((), -1, -1)
            if request.is_finished:  # it could not be verified or scored
                self._outputs.append(StepOutput(request, [], [], []))
            elif row.samples:
                packed += [first + row.num_tokens + node for node in path]
                if self._states.at_drafts and request.draft is not None:
                    drafted[request.slot] = range(first + row.num_tokens, first + row.num_tokens + len(request.draft))
                moves += self._moves(request, start + row.num_tokens, path)
                output = self._commit_tokens(request, path, next_token)
                self._outputs.append(output)
                self._score_output(output, target.logits, [entry, *(entry + 1 + node for node in path)])
            request.num_computed = start + len(packed)
            final[request.slot] = (range(start, request.num_computed), packed)
        if moves:
            self.runner.cache.move([source for source, _ in moves], [destination for _, destination in moves])
        self._states.record(target.captured, final, drafted)
        for row in target.rows:
            if row.request.is_finished:
                if row.request.error is None:
                    self._fork_children(row.request)
                self._finish(row.request)

    def _finish(self, request: Request) -> None:
        """Takes a request that has ended out of the batch; sequences that were to fork from it start by themselves."""
        for child in request.fork_group:
            self.scheduler.add(child)
        request.fork_group = []
        if request.error is not None and request.table is not None:
            # Attention that masks entries multiplies them by zero, and NaN stays NaN: nobody may find any there.
            size, allocator = self.plan.block_size, self.scheduler.allocator
            own = [block * size for block in request.table.blocks if not allocator.is_shared(block)]
            for cache in self._shared_caches:
                cache.clear([slot for begin in own for slot in range(begin, begin + size)])
        self.scheduler.finish(request, "finished" if request.error is None else "aborted")

    def _moves(self, request: Request, first: int, path: Sequence[int]) -> list[tuple[int, int]]:
        """KV slots (from, to) that bring an accepted path to the positions behind `first`; a chain needs none."""
        assert request.table is not None
        moves = []
        for depth, node in enumerate(path):
            if node != depth:
                source, destination = first + node, first + depth
                slots = request.table.slots
                moves.append((slots(source, source + 1)[0], slots(destination, destination + 1)[0]))
        return moves

    def _commit_tokens(self, request: Request, path: Sequence[int], next_token: int) -> StepOutput:
        draft = request.draft
        tokens = [draft.tokens[node] for node in path] if draft else []
        sources: list[str | None] = [draft.method if draft else None for _ in path]
        before = len(request.tokens)
        try:
            request.append([*tokens, next_token], [*sources, None])
        except Exception as error:  # a tokenizer that fails on its own ids
            request.fail(error)
        taken = len(request.tokens) - before
        num_accepted = min(taken, len(path))
        for stats in (request.stats, self.stats):
            stats.record(len(draft) if draft else 0, num_accepted, draft.method if draft else "")
        request.outcome = Outcome(draft.method, len(draft), tuple(path), tuple(draft.tokens)) if draft else None
        request.outcome_link = draft.link if draft else 0
        request.draft = None
        self.num_generated_tokens += taken
        texts = [] if request.text is None or request.error else request.text.take(taken)
        return StepOutput(request, request.tokens[before:], [*sources, None][:taken], texts)

    @staticmethod
    def _score_output(output: StepOutput, logits: torch.Tensor, entries: list[int]) -> None:
        """Keeps the log-probabilities of new tokens, if they were asked for."""
        count = output.request.params.logprobs
        if count is not None:
            used = entries[: len(output.new_tokens)]
            try:
                output.request.logprobs += gather_logprobs(logits[used], output.new_tokens, count)
            except Exception as error:  # no memory for all of a vocabulary, say
                output.request.fail(error)

    @staticmethod
    def _score_prompts(target: _TargetStep) -> None:
        """Keeps the log-probabilities of prompt tokens, if they were asked for."""
        for request, entry, positions in target.scored:
            first = len(request.prompt_logprobs) + 1
            tokens = request.tokens[first : first + positions]
            count = request.params.prompt_logprobs
            assert count is not None
            try:
                request.prompt_logprobs += gather_logprobs(target.logits[entry : entry + positions], tokens, count)
            except Exception as error:
                request.fail(error)

    def _fork_children(self, parent: Request) -> None:
        """Starts the other completions of a prompt that has just been computed."""
        children, parent.fork_group = parent.fork_group, []
        for child in children:
            copies = self.scheduler.fork(parent, child) if parent.slot >= 0 else None
            if copies is None:
                self.scheduler.add(child)
                continue
            self.chain.fork(parent, child)
            for cache in self._shared_caches:
                cache.move([source for source, _ in copies], [destination for _, destination in copies])

    def _propose(self, rows: list[ScheduledRow]) -> None:
        """Lets the speculators draft for the rows that go on."""
        for request, slot, reason in self.scheduler.ended:
            self.chain.end(request, slot, reason)
        self.scheduler.ended.clear()
        alive = [row.request for row in rows if row.request.slot >= 0]
        contended = bool(self.scheduler.waiting) or any(request.num_pending > 1 for request in alive)
        self.chain.propose(alive, self.scheduler.reserve, contended)
        for request in alive:
            request.outcome = None
            if request.num_output_tokens:  # only now, so that children share the speculators' KV of the prompt too
                self._fork_children(request)

    # ---- the end --------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.is_closed:
            raise RequestError("the engine is closed")
        if os.getpid() != self._process:  # the threads that compute are not here, and waiting for them would not end
            raise RequestError(
                f"the engine belongs to process {self._process}, from which this one was forked; start an engine in this "
                "process, with multiprocessing's start method 'spawn'"
            )

    def close(self) -> None:
        """Ends all requests and lets go of all memory, when the step that runs is over. Safe to call twice."""
        with self._turns, own_torch_state():
            if self.is_closed:
                return
            self._abort({request.id for request in self.scheduler.requests()}, error=CLOSED)
            self.is_closed = True
            for close in reversed(self._closers):
                close()
            self._closers.clear()
            self._shared_caches.clear()
            del self._states, self.runner, self.chain, self._verification, self.registry
