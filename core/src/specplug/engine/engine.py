"""The engine: one step is schedule → target forward → verify → commit → propose."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from specplug.engine.commit import Committer, StepOutputs
from specplug.engine.contention import CoreContention
from specplug.engine.early_drafting import EarlyDrafting, EarlyStep
from specplug.engine.fair_lock import FairLock
from specplug.engine.lifecycle import Lifecycle
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
        self.is_closed = False
        self._facade = planned.facade
        self._shared_caches = list(shared_caches)
        self._states = states
        self._requests = requests
        self._verification = verification
        self._tracer = Tracer(chain.policy)
        self.lock = lock
        self._contention = CoreContention()
        self._outputs = StepOutputs(self.stats)
        self._committer = Committer(runner, states, self._outputs, self._tracer)
        ahead = None if runner.states is not None else runner.pending
        self._ahead = RunAhead(ahead, chain, verification, states)
        self._early = None
        if runner.pending is not None and runner.accepted is not None:
            self._early = EarlyDrafting(
                runner.pending, runner.accepted, chain, verification, states, scheduler, self.plan.max_model_len
            )
        self._lifecycle = Lifecycle(scheduler, self._outputs, chain, runner, self._shared_caches)

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
    def num_generated_tokens(self) -> int:
        """How many tokens were committed."""
        return self._outputs.num_tokens

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
        return [] if self.is_closed else self._lifecycle.abort(request_ids, error)

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
            self._end_rows()
            self._outputs.deliver()
            return
        self._end_rows()  # those that ended since the last step, before speculators hear of others in their slots
        started = time.perf_counter()
        target = run_target(self.runner, self._states, rows)
        if self.runner.pending is not None:
            self.runner.pending.fetch()
        self._settle()
        self._outputs.deliver()
        early = None
        runs_ahead = self._ahead.takes(target)
        if runs_ahead:
            self._ahead.draw(target)
        else:
            early = None if self._early is None else self._early.begin(target)
            verdict = (
                self._verification.verify(target.requests, target.offsets, target.logits[: target.offsets[-1]])
                if early is None
                else early.verdict()
            )
            self._committer.commit(target, verdict)
        self._end_finished(target)
        seconds = time.perf_counter() - started
        decoding = all(row.samples and row.num_tokens == 1 for row in rows)
        self.chain.observe([row.request for row in rows], seconds, decoding=decoding)
        self._end_rows()
        if not runs_ahead:
            self._propose(rows, early)
        if self._tracer.open:
            self._tracer.end_step(target, decoding, seconds, time.perf_counter() - started)
        if self.runner.pending is None:
            self._outputs.deliver()
        else:
            self._outputs.deliver_ended()
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
            if entry.request.is_finished:
                self._lifecycle.finish(entry.request)

    def _end_finished(self, target: TargetStep) -> None:
        """Caches full blocks, and takes rows that have ended out of the batch."""
        if self.prefix_cache is not None:
            self.prefix_cache.store(
                [row.request for row in target.rows if row.request.slot >= 0], self.scheduler.allocator
            )
        for row in target.rows:
            if row.request.is_finished and row.request.slot >= 0:
                if row.request.error is None:
                    self._lifecycle.fork_children(row.request)
                self._lifecycle.finish(row.request)

    def _end_rows(self) -> None:
        """Tells the speculators' chain of rows that left the batch."""
        for request, slot, reason in self.scheduler.ended:
            self.chain.end(request, slot, reason)
        self.scheduler.ended.clear()

    def _propose(self, rows: list[ScheduledRow], early: EarlyStep | None) -> None:
        """Lets the speculators draft for the rows that continue."""
        alive = [row.request for row in rows if row.request.slot >= 0]
        for request in alive:
            if request.stored_by:
                self.chain.resume(request)
        contended = bool(self.scheduler.waiting) or any(request.num_pending > 1 for request in alive)
        self.chain.propose(alive, self.scheduler.reserve, contended, None if early is None else early.proposal)
        if self.prefix_cache is not None:
            self.prefix_cache.store_entries(alive, self.scheduler.allocator, self.chain.num_stored)
        for request in alive:
            request.outcome = None
            if request.fork_group and request.num_output_tokens:  # now, so that children share the speculators' KV too
                self._lifecycle.fork_children(request)

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
            self._lifecycle.finish(request)
        self._outputs.deliver()

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
            del self._states, self.runner, self.chain, self._verification, self.registry, self._facade
            del self._ahead, self._early, self._committer, self._lifecycle
