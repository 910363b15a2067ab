"""The engine: one step is schedule → target forward → verify → commit → propose."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from specplug.contract.verification import Verdict
from specplug.engine.commit import StepOutputs, clear_kv, commit_tokens, kv_moves, score_output, score_prompts
from specplug.engine.contention import CoreContention
from specplug.engine.fair_lock import FairLock
from specplug.engine.planning import PlannedEngine
from specplug.engine.requests import RequestFactory
from specplug.engine.run_ahead import RunAhead
from specplug.engine.scheduler import ScheduledRow, Scheduler
from specplug.engine.target_step import TargetStep, run_target
from specplug.engine.trace import Tracer
from specplug.errors import RequestError
from specplug.lora.registry import AdapterRegistry
from specplug.model.kv_cache import KVCache
from specplug.model.runner import ModelRunner
from specplug.model.torch_state import own_torch_state
from specplug.request import Request, StepOutput
from specplug.sampling.params import SamplingParams
from specplug.speculation.chain import SpeculatorChain
from specplug.speculation.target_states.store import TargetStateStore
from specplug.speculation.verification.dispatch import Verification
from specplug.stats import SpeculationStats

CLOSED = "the engine was closed before the request ended"


class Engine:
    """Runs requests in batches, speculatively and losslessly. `specplug.engine.startup.start.start_engine` makes it.

    Its methods may be called from any thread; one thread at a time works on it, see `FairLock`.

    Args:
        planned: configuration, memory plan and plugins.
        runner: the target.
        shared_caches: the KV caches that use the target's block tables, the target's own included.
        chain: the speculators.
        states: the target states that speculators declared.
        requests: makes requests.
        verification: decides what every row emits.
        scheduler: chooses the rows of each step.
        lock: held by whoever works on the engine.
        adapters: the LoRA adapters that requests may use; None if they may not.
    """

    def __init__(
        self,
        planned: PlannedEngine,
        *,
        runner: ModelRunner,
        shared_caches: Sequence[KVCache],
        chain: SpeculatorChain,
        states: TargetStateStore,
        requests: RequestFactory,
        verification: Verification,
        scheduler: Scheduler,
        lock: FairLock,
        adapters: AdapterRegistry | None = None,
    ) -> None:
        self.config = planned.config
        self.plan = planned.plan
        self.registry = planned.registry
        self.runner = runner
        self.chain = chain
        self.scheduler = scheduler
        self.prefix_cache = scheduler.prefix_cache
        self.adapters = adapters
        self.stats = SpeculationStats()
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.is_closed = False
        self._facade = planned.facade
        self._shared_caches = list(shared_caches)
        self._states = states
        self._requests = requests
        self._verification = verification
        self._tracer = Tracer(chain.policy)
        self.lock = lock
        self._contention = CoreContention()
        self._outputs = StepOutputs()
        ahead = None if runner.states is not None else runner.pending
        self._ahead = RunAhead(ahead, chain, verification)

    # ---- speculators ----------------------------------------------------------------------------------------------

    @property
    def methods(self) -> list[str]:
        """The methods of the speculators, in the order in which they are asked."""
        return [speculator.method for speculator in self.chain.speculators]

    @property
    def unverified_methods(self) -> list[str]:
        """Those with a `verify` of their own, whose results core does not check."""
        return [speculator.method for speculator in self.chain.speculators if speculator.overrides_verify]

    @property
    def learns(self) -> bool:
        """Whether any speculator learns from outputs, so that a repeated prompt may be drafted differently."""
        return any(speculator.traits.learns for speculator in self.chain.speculators)

    @property
    def faults(self) -> dict[str, int]:
        """Faults by method."""
        return self.chain.faults

    @property
    def propose_seconds(self) -> dict[str, float]:
        """Time spent in `propose` by method."""
        return self.chain.seconds

    @property
    def vocab_size(self) -> int:
        """How many token ids the target has."""
        return self._requests.vocab_size

    # ---- requests -------------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> list[Request]:
        """Queues a request. With `n` completions, the others are forked from the first once its prompt is computed.

        Args:
            request_id: the caller's name for it.
            prompt_ids: the prompt.
            params: sampling parameters.
            cache_salt: it shares cached KV only with requests of the same salt.
            priority: a lower one is served first, if the engine schedules by priority.

        Raises:
            RequestError: the request can never be served; the message says why.
        """
        family = self.make_request(request_id, prompt_ids, params, cache_salt=cache_salt, priority=priority)
        self.submit([family])
        return family

    def make_request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> list[Request]:
        """The sequences of a request, checked but not queued; never waits for a step.

        Raises:
            RequestError: the request can never be served; the message says why.
        """
        self._check_open()
        with own_torch_state():
            return self._requests.make(request_id, prompt_ids, params, cache_salt, priority)

    def submit(self, families: Sequence[list[Request]]) -> None:
        """Queues requests, all at once."""
        with self.lock:
            self._check_open()
            for family in families:
                self.scheduler.add(family[0])
                self.num_prompt_tokens += family[0].num_prompt_tokens

    def abort(self, *request_ids: str) -> list[Request]:
        """Ends all sequences of requests; returns those that were not finished."""
        with self.lock:
            return self._abort(set(request_ids))

    def abandon(self, *request_ids: str) -> None:
        """Aborts requests without waiting for the current step; for finalisers."""
        self.lock.defer(lambda: self._abort(set(request_ids)))

    def _abort(self, request_ids: Collection[str], error: str | None = None) -> list[Request]:
        self._outputs.deliver(self.stats)
        ended = []
        for request in list(self.scheduler.requests()):
            if request.id not in request_ids:
                continue
            if not request.is_finished:
                request.error = error
                request.end("abort")
                self._outputs.drop(request)
                ended.append(request)
                if request.listener is not None:
                    request.listener.end(request)
            request.fork_group = []
            self.scheduler.finish(request, "aborted")
        return ended

    def reset_prefix_cache(self) -> None:
        """Forgets all cached KV; requests that run go on with theirs."""
        with self.lock:
            allocator = self.scheduler.allocator
            allocator.forget(allocator.cached.all())

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work

    # ---- the step -------------------------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """Advances every scheduled row; returns what was committed for each row that produced tokens or failed.

        On a GPU what a step commits is returned by the next one, while that computes; a request's last tokens never wait.
        An error of one row ends that row alone, with the reason in `request.error`. Any other error is raised: what was
        committed stays, and the rows continue at the next step.
        """
        with self.lock, own_torch_state():
            self._check_open()
            try:
                self._advance()
            except BaseException:
                self._recover()
                raise
            return self._outputs.take()

    def _advance(self) -> None:
        rows = self._schedule()
        if not rows:
            self._outputs.deliver(self.stats)
            return
        started = time.perf_counter()
        target = run_target(self.runner, self._states, rows)
        if self.runner.pending is not None:
            self.runner.pending.fetch()
        self._settle()
        self._outputs.deliver(self.stats)
        runs_ahead = self._ahead.takes(target)
        if runs_ahead:
            self._draw_ahead(target)
        else:
            verdict = self._verification.verify(target.requests, target.offsets, target.logits[: target.offsets[-1]])
            self._commit(target, verdict)
        seconds = time.perf_counter() - started
        decoding = all(row.samples and row.num_tokens == 1 for row in rows)
        self.chain.observe([row.request for row in rows], seconds, decoding=decoding)
        self._end_rows()
        if not runs_ahead:
            self._propose(rows)
        if self._tracer.is_tracing:
            self._tracer.end_step(target, decoding, seconds, time.perf_counter() - started)
        if self.runner.pending is None or self._tracer.is_tracing or self._outputs.has_ended:
            self._outputs.deliver(self.stats)
        self.num_steps += 1
        self._contention.observe()

    def _schedule(self) -> list[ScheduledRow]:
        """The rows of the next step. While tokens are in flight they are read first, unless the rows just go on."""
        rows = self.scheduler.continue_rows() if self._ahead else None
        if not rows:
            self._settle()
            rows = self.scheduler.schedule()
        return rows

    def _settle(self) -> None:
        """Commits the tokens that were drawn ahead; the device may compute the step after them meanwhile."""
        for entry in self._ahead.settle():
            self._outputs.add(entry)
            self.num_generated_tokens += len(entry.new_tokens)
            if entry.request.is_finished:
                self._finish(entry.request)

    def _draw_ahead(self, target: TargetStep) -> None:
        """Leaves this step's tokens on the device, where the next forward takes them from."""
        self._ahead.draw(target)
        final: dict[int, tuple[range, list[int]]] = {}
        for row, first in zip(target.rows, target.first, strict=True):
            request = row.request
            if request.slot >= 0:
                start, request.num_computed = request.num_computed, request.num_computed + row.num_tokens
                final[request.slot] = (range(start, request.num_computed), list(range(first, first + row.num_tokens)))
        self._states.record(target.captured, final, {})
        self.chain.rest()
        self._after_forward(target)

    def _commit(self, target: TargetStep, verdict: Verdict) -> None:
        """Appends accepted tokens, makes their KV contiguous, and ends rows that are done."""
        moves: list[tuple[int, int]] = []
        final: dict[int, tuple[range, list[int]]] = {}
        drafted: dict[int, range] = {}
        decisions = iter(zip(verdict.accepted, verdict.next_tokens, target.offsets, strict=False))
        score_prompts(target)
        for row, first in zip(target.rows, target.first, strict=True):
            request = row.request
            start = request.num_computed
            packed = list(range(first, first + row.num_tokens))
            path, next_token, entry = next(decisions) if row.samples else ((), -1, -1)
            if request.slot < 0:  # its last token, known by now, was the one before this step
                continue
            if request.is_finished:  # verification or scoring failed for it
                self._outputs.add(StepOutput(request, [], [], []))
            elif row.samples:
                packed += [first + row.num_tokens + node for node in path]
                if self._states.at_drafts and request.draft is not None:
                    drafted[request.slot] = range(first + row.num_tokens, first + row.num_tokens + len(request.draft))
                moves += kv_moves(request, start + row.num_tokens, path)
                self.runner.keep(request.slot, path)
                draft = request.draft
                committed = commit_tokens(request, path, next_token)
                score_output(committed, target.logits, [entry, *(entry + 1 + node for node in path)])
                self.num_generated_tokens += len(committed.new_tokens)
                if request.is_traced:
                    entries = target.logits[entry : entry + 1 + (0 if draft is None else len(draft))]
                    output = committed.deliver(self.stats)
                    self._outputs.add(self._tracer.record(output, draft, path, entries, row.num_tokens))
                else:
                    self._outputs.add(committed)
            request.num_computed = start + len(packed)
            final[request.slot] = (range(start, request.num_computed), packed)
        if moves:
            self.runner.cache.move([source for source, _ in moves], [destination for _, destination in moves])
        self._states.record(target.captured, final, drafted)
        self._after_forward(target)

    def _after_forward(self, target: TargetStep) -> None:
        """Caches full blocks, and takes rows that have ended out of the batch."""
        if self.prefix_cache is not None:
            self.prefix_cache.store(
                [row.request for row in target.rows if row.request.slot >= 0], self.scheduler.allocator
            )
        for row in target.rows:
            if row.request.is_finished and row.request.slot >= 0:
                if row.request.error is None:
                    self._fork_children(row.request)
                self._finish(row.request)

    def _end_rows(self) -> None:
        """Tells the speculators' chain of rows that left the batch."""
        for request, slot, reason in self.scheduler.ended:
            self.chain.end(request, slot, reason)
        self.scheduler.ended.clear()

    def _propose(self, rows: list[ScheduledRow]) -> None:
        """Lets the speculators draft for the rows that continue."""
        alive = [row.request for row in rows if row.request.slot >= 0]
        for request in alive:
            if request.stored_by:
                self.chain.resume(request)
        contended = bool(self.scheduler.waiting) or any(request.num_pending > 1 for request in alive)
        self.chain.propose(alive, self.scheduler.reserve, contended)
        if self.prefix_cache is not None:
            self.prefix_cache.store_entries(alive, self.scheduler.allocator, self.chain.num_stored)
        for request in alive:
            request.outcome = None
            if request.num_output_tokens:  # only now, so that children share the speculators' KV of the prompt too
                self._fork_children(request)

    def _fork_children(self, parent: Request) -> None:
        """Starts the other completions of a prompt that has just been computed."""
        children, parent.fork_group = parent.fork_group, []
        for child in children:
            copies = self.scheduler.fork(parent, child) if parent.slot >= 0 else None
            if copies is None:
                self.scheduler.add(child)
                continue
            self.chain.fork(parent, child)
            self.runner.fork(parent.slot, child.slot)
            for cache in self._shared_caches:
                cache.move([source for source, _ in copies], [destination for _, destination in copies])

    def _finish(self, request: Request) -> None:
        """Removes a finished request from the batch; sequences that would have been forked from it start by themselves."""
        for child in request.fork_group:
            self.scheduler.add(child)
        request.fork_group = []
        if request.error is not None:
            clear_kv(request, self.scheduler.allocator, self._shared_caches, self.plan.block_size)
        self.scheduler.finish(request, "finished" if request.error is None else "aborted")

    def _recover(self) -> None:
        """After an interrupted step: the KV of all running rows is recomputed, and no committed token is lost."""
        self._tracer.abandon()
        self._ahead.forget()
        for request in reversed(list(self.scheduler.running)):  # each goes to the head of the queue
            if not request.is_finished:
                self.scheduler.preempt(request)
                continue
            if not self._outputs.has(request):  # interrupted before it had one
                self._outputs.add(StepOutput(request, [], [], []))
            self._finish(request)
        self._outputs.deliver(self.stats)

    # ---- the end --------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.is_closed:
            raise RequestError("the engine is closed")
        self.lock.check_process()

    def close(self) -> None:
        """Waits for the current step, ends all requests and frees all memory. Safe to call twice, and in a fork."""
        if self.lock.is_forked:
            return
        with self.lock, own_torch_state():
            if self.is_closed:
                return
            self._abort({request.id for request in self.scheduler.requests()}, error=CLOSED)
            self.is_closed = True
            self._contention.close()
            self.runner.close()
            self._facade.close()
            self._shared_caches.clear()
            del self._states, self.runner, self.chain, self._verification, self._ahead, self.registry, self._facade
