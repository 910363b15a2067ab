"""An engine under the kit's control, and the limit of the time that a call may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from specplug.contract.resources import MemoryBudget, MemoryRegion
from specplug.contract.types import Proposal, ProposalBatch, ProposalRow
from specplug.contract.verification import Verdict
from specplug.engine.engine import Engine
from specplug.errors import GenerationError
from specplug.host.loading import max_nodes_of
from specplug.llm import LLM
from specplug.model.compile.cuda_graphs import HELD_TOKENS, MOST_CAPTURED
from specplug.model.kv_cache import BlockAllocator
from specplug.plugins.registry import RegisteredSpeculator
from specplug.request import Request
from specplug.sampling.params import SamplingParams
from specplug.sampling.randomness import EngineRandomness
from specplug.testing.failures import FundamentalFailure

MOST_SECONDS = 1.0
_SLOW_FACTOR = 4.0
_MOST_IN_A_ROW = 3


class Pace:
    """Ends the kit early where every `propose` takes long: each check would take minutes, and all would be slow alike."""

    def __init__(self) -> None:
        self._slow: list[float] = []

    def note(self, proposing: float, rest: float) -> None:
        """Notes a step of the engine.

        Args:
            proposing: seconds in `propose`; 0 where it was not called.
            rest: seconds of the step without it.

        Raises:
            FundamentalFailure: several calls in a row were slow.
        """
        if proposing <= 0:
            return
        limit = max(MOST_SECONDS, _SLOW_FACTOR * rest)
        self._slow = [*self._slow, proposing] if proposing > limit else []
        if len(self._slow) >= _MOST_IN_A_ROW:
            raise FundamentalFailure(
                f"at most {MOST_SECONDS:g} s for a call of propose, or {_SLOW_FACTOR:g} times the target's own step",
                f"{len(self._slow)} calls in a row took {min(self._slow):.1f} to {max(self._slow):.1f} s, "
                f"the target's own part of the last step {rest:.2f} s",
            )


Verify = Callable[[Sequence[Request], Sequence[int], torch.Tensor], Verdict]
_MOST_STEPS = 20_000


class Session:
    """One engine under test."""

    def __init__(self, llm: LLM, pace: Pace | None = None) -> None:
        self.llm = llm
        self._pace = pace
        self.errors: list[Exception] = []
        self._count = 0

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.llm.engine

    @property
    def speculator(self) -> RegisteredSpeculator:
        """The speculator under test, the first of its chain."""
        return self.engine.chain.speculators[0]

    @property
    def randomness(self) -> EngineRandomness:
        """The engine's own generators."""
        randomness: EngineRandomness = self.engine.registry.verifier._randomness
        return randomness

    @property
    def vocabulary(self) -> int:
        """The target's."""
        return self.engine.runner.architecture.vocab_size

    def regions(self, *, shares_tables: bool = True) -> list[MemoryRegion]:
        """The memory that the speculator plans, asked for once more; also for an engine that shares no block tables."""
        config, plan = self.engine.config, self.engine.plan
        budget = MemoryBudget(
            total_bytes=plan.budget_bytes,
            block_size=plan.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=plan.max_model_len,
            max_num_batched_tokens=self.engine.scheduler.max_num_batched_tokens,
            num_speculative_tokens=max(map(max_nodes_of, self.engine.chain.speculators)),
            dtype=self.engine.runner.cache.dtype,
            compiled_output_tokens=HELD_TOKENS if self.engine.runner.cache.device.type == "cuda" else 0,
            loop_rows=min(MOST_CAPTURED, config.max_num_seqs) if self.engine.runner.cache.device.type == "cuda" else 0,
            shares_tables=shares_tables,
        )
        return list(self.speculator.plan_memory(budget=budget) or ())

    def request_of(self, row: ProposalRow) -> Request:
        """The request of a row."""
        return next(request for request in self.engine.scheduler.running if request.slot == row.row_id)

    def around_propose(self, around: Callable[[ProposalBatch, Callable[[], Proposal | None]], Proposal | None]) -> None:
        """Calls `around(batch, call)` in place of the speculator; `call()` asks the speculator."""
        call = self.speculator.propose

        def propose(batch: ProposalBatch) -> Proposal | None:
            return around(batch, lambda: call(batch=batch))

        self.speculator.propose = propose

    def take_over_verification(self, verify: Verify) -> None:
        """Lets the kit decide what is accepted, and what is emitted, instead of any verifier."""
        self.engine._verification.verify = verify  # type: ignore[method-assign,assignment]

    def limit_blocks(self, tokens: int) -> int:
        """Leaves the engine with few KV blocks, so that rows are preempted; returns how many."""
        count = min(self.engine.plan.num_blocks, -(-tokens // self.engine.plan.block_size))
        self.engine.scheduler.allocator = BlockAllocator(count)
        return count

    def end_with(self, token: int) -> None:
        """Makes a token the target's end-of-sequence token."""
        self.engine._requests._eos_ids = frozenset([token])

    def add(self, prompt: Sequence[int], params: SamplingParams) -> list[Request]:
        """Queues a request."""
        self._count += 1
        return self.engine.add_request(str(self._count), list(prompt), params)

    def finish(self, each_step: Callable[[int], None] = lambda step: None) -> int:
        """Runs until nothing is left; returns the number of steps.

        Raises:
            RuntimeError: it never ends.
            FundamentalFailure: its calls of `propose` take too long.
        """
        steps = 0
        while self.engine.has_unfinished_requests:
            self._step()
            steps += 1
            each_step(steps)
            if steps > _MOST_STEPS:
                raise RuntimeError(f"the engine did not finish in {_MOST_STEPS} steps")
        return steps

    def _step(self) -> None:
        if self._pace is None:
            self.engine.step()
            return
        seconds, method = self.engine.chain.seconds, self.speculator.method
        started = time.perf_counter()
        self.engine.step()
        whole = time.perf_counter() - started
        proposing = self.engine.chain.seconds[method] - seconds[method]
        self._pace.note(proposing, whole - proposing)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        """The outputs of a batch of requests; of forks the first's."""
        families = [self.add(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        self.finish()
        for request in (request for family in families for request in family):
            if request.error is not None:
                raise GenerationError(request.error)
        return [family[0].output_ids for family in families]
