"""Runs of a workload on an engine, and what they cost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch

from specplug.bench.workload import BenchPrompt, Cell, Workload
from specplug.errors import GenerationError
from specplug.sampling.params import SamplingParams
from specplug.stats import SpeculationStats

if TYPE_CHECKING:
    from specplug.engine.engine import Engine
    from specplug.llm import LLM
    from specplug.request import StepOutput


@attrs.frozen
class StepCosts:
    """The costs of one step of the engine.

    Attributes:
        forward_seconds: in the forward of the target.
        draft_seconds: in `propose` of the speculators.
    """

    forward_seconds: float
    draft_seconds: float


class EngineTimer:
    """Times the forwards and proposals of an engine. On a GPU, events in the stream time forwards, without synchronization.

    The engine itself times proposals with the host clock: they begin after the synchronization of the step.

    Args:
        engine: to time until `detach`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._forward = engine.runner.forward
        self._is_cuda = engine.runner.device.type == "cuda"
        self._spans: list[list[tuple[Any, Any]]] = []
        self._drafting: list[float] = []
        setattr(engine.runner, "forward", self._timed_forward)  # noqa: B010  # shadows the method on this one instance

    def begin_step(self) -> None:
        """Begins a new step."""
        self._spans.append([])
        self._drafting.append(self._draft_seconds())

    def costs(self) -> list[StepCosts]:
        """Returns the costs of the steps since the last call."""
        if self._is_cuda:
            torch.cuda.synchronize(self._engine.runner.device)
        drafting = [*self._drafting[1:], self._draft_seconds()][: len(self._drafting)]
        costs = [
            StepCosts(sum(self._seconds(*span) for span in spans), after - before)
            for spans, before, after in zip(self._spans, self._drafting, drafting, strict=True)
        ]
        self._spans, self._drafting = [], []
        return costs

    def detach(self) -> None:
        """Restores the engine."""
        vars(self._engine.runner).pop("forward", None)

    def _draft_seconds(self) -> float:
        return sum(self._engine.chain.seconds.values())

    def _timed_forward(self, *args: Any, **kwargs: Any) -> Any:
        started = self._now()
        result = self._forward(*args, **kwargs)
        if self._spans:
            self._spans[-1].append((started, self._now()))
        return result

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, started: Any, ended: Any) -> float:
        return started.elapsed_time(ended) / 1e3 if self._is_cuda else ended - started


Advance = Callable[[int], None]


@attrs.define
class DecodeCosts:
    """The costs of the steps of a run in which the batch is full and every sequence decodes.

    Attributes:
        steps: their number.
        rows: their sequences, summed over steps.
        tokens: generated.
        seconds: in total.
        forward_seconds: of these in the forward of the target.
        draft_seconds: of these in the speculators.
    """

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    draft_seconds: float = 0.0


@attrs.define
class Measurement:
    """One run of a contestant.

    Attributes:
        tokens: generated in total.
        seconds: from the first request to the last token.
        first_token_seconds: for each request, from its submission to its first token.
        token_seconds: for each later token, the time since the previous tokens; tokens that arrive together share it.
        outputs: the token ids of every request.
        decode: the costs of decode steps; None if they are unknown.
        stats: of speculation; None if they are unknown.
        faults: failures of speculators, which lose drafts.
        unverified_methods: methods with a `verify` of their own, which core does not check.
    """

    tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: list[float] = attrs.field(factory=list)
    token_seconds: list[float] = attrs.field(factory=list)
    outputs: list[list[int]] = attrs.field(factory=list)
    decode: DecodeCosts | None = None
    stats: SpeculationStats | None = None
    faults: int = 0
    unverified_methods: list[str] = attrs.field(factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Throughput, prompts included."""
        return self.tokens / self.seconds

    def add_tokens(self, count: int, gap: float) -> None:
        """Adds `count` tokens of a request that arrived together, `gap` seconds after the previous ones."""
        self.token_seconds += [gap / count] * count


@attrs.define
class _Running:
    """A running request: its index, and the time of its last token (or of its submission)."""

    index: int
    last: float
    has_tokens: bool = False


class Measurer:
    """Runs workloads on an engine with constant concurrency: when a request ends, the next one begins."""

    def __init__(self, llm: LLM) -> None:
        self._engine: Engine = llm.engine
        self._timer = EngineTimer(llm.engine)

    def run(self, workload: Workload, cell: Cell, advance: Advance = lambda tokens: None) -> Measurement:
        """Generates the workload once.

        Args:
            workload: to generate.
            cell: the concurrency and temperature.
            advance: called with the number of new tokens of every step.

        Raises:
            RequestError: a prompt is invalid.
        """
        params = SamplingParams(temperature=cell.temperature, max_tokens=workload.max_tokens, ignore_eos=True)
        requests = workload.requests(cell.batch)
        self._timer.costs()
        run = _Run(self._engine, self._timer, requests, cell.batch, params)
        faults = sum(self._engine.chain.faults.values())
        measured = run.finish(advance)
        measured.faults = sum(self._engine.chain.faults.values()) - faults
        measured.unverified_methods = [s.method for s in self._engine.chain.speculators if s.overrides_verify]
        return measured

    def close(self) -> None:
        """Restores the engine."""
        self._timer.detach()


class _Run:
    """One run over the requests."""

    def __init__(
        self,
        engine: Engine,
        timer: EngineTimer,
        requests: Sequence[BenchPrompt],
        concurrency: int,
        params: SamplingParams,
    ) -> None:
        self._engine = engine
        self._timer = timer
        self._waiting = deque(enumerate(requests))
        self._concurrency = concurrency
        self._params = params
        self._running: dict[str, _Running] = {}
        self._decoding: list[tuple[bool, float, int]] = []
        self.measured = Measurement(outputs=[[] for _ in requests], stats=SpeculationStats())

    def finish(self, advance: Advance) -> Measurement:
        """Runs until all requests have ended."""
        started = time.perf_counter()
        try:
            while self._waiting or self._running:
                self._submit()
                advance(self._step())
        except BaseException:
            for request_id in self._running:
                self._engine.abort(request_id)
            raise
        self.measured.seconds = time.perf_counter() - started
        self.measured.decode = self._decode_costs()
        return self.measured

    def _submit(self) -> None:
        while self._waiting and len(self._running) < self._concurrency:
            index, prompt = self._waiting.popleft()
            request_id = f"{prompt.where} (#{index + 1})"
            arrival = time.perf_counter()
            self._engine.add_request(request_id, prompt.ids, self._params)
            self._running[request_id] = _Running(index, arrival)

    def _step(self) -> int:
        decodes = len(self._running) == self._concurrency and all(r.has_tokens for r in self._running.values())
        self._timer.begin_step()
        before = time.perf_counter()
        outputs = self._engine.step()
        now = time.perf_counter()
        new = sum(self._record(output, now) for output in outputs)
        self._decoding.append((decodes and len(outputs) == self._concurrency, now - before, new))
        self.measured.tokens += new
        return new

    def _record(self, output: StepOutput, now: float) -> int:
        request, count = output.request, len(output.new_tokens)
        running = self._running[request.id]
        if running.has_tokens:
            self.measured.add_tokens(count, now - running.last)
        elif count:
            self.measured.first_token_seconds.append(now - running.last)
        running.has_tokens, running.last = True, now
        if request.error is not None:
            raise GenerationError(f"{request.id}: {request.error}")
        if request.is_finished:
            del self._running[request.id]
            self.measured.outputs[running.index] = request.output_ids
            assert self.measured.stats is not None
            self.measured.stats.add(request.stats)
        return count

    def _decode_costs(self) -> DecodeCosts:
        total = DecodeCosts()
        for (decodes, seconds, tokens), costs in zip(self._decoding, self._timer.costs(), strict=True):
            if decodes:
                total.steps += 1
                total.rows += self._concurrency
                total.tokens += tokens
                total.seconds += seconds
                total.forward_seconds += costs.forward_seconds
                total.draft_seconds += costs.draft_seconds
        return total
