"""One run of a workload, and what it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs

from specplug.bench.timing import EngineTimer
from specplug.bench.workload import BenchPrompt, Cell, Workload
from specplug.errors import GenerationError
from specplug.sampling.params import SamplingParams
from specplug.stats import SpeculationStats

if TYPE_CHECKING:
    from specplug.engine.engine import Engine
    from specplug.llm import LLM
    from specplug.request import StepOutput

Advance = Callable[[int], None]


@attrs.define
class DecodeCosts:
    """The steps of a run in which every place of the batch decodes: no prompt, no empty place.

    Attributes:
        steps: how many.
        rows: sequences in them, added up.
        tokens: what they generated.
        seconds: the whole steps.
        forward_seconds: of these in the target's forward.
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
    """What one contestant did in one run.

    Attributes:
        tokens: generated in all.
        seconds: from the first request to the last token.
        first_token_seconds: for each request, from its submission to its first token.
        token_seconds: for each later token, the time since the tokens before it; tokens that come together share it.
        outputs: the ids of every request.
        decode: the steps that only decode; None where they are not seen.
        stats: what speculation did; None where it is not seen.
        faults: failures of speculators, which cost drafts.
        unverified_methods: those that bring a `verify` of their own, which core does not check.
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

    def arrived(self, count: int, gap: float) -> None:
        """Notes `count` tokens of one request that came together, `gap` seconds after those before them."""
        self.token_seconds += [gap / count] * count


@attrs.define
class _Running:
    """A request under way: its place among the requests, and when it last got a token (or was submitted)."""

    index: int
    last: float
    has_tokens: bool = False


class Measurer:
    """Runs workloads on a live engine, with a fixed number of requests at a time: when one ends, the next begins."""

    def __init__(self, llm: LLM) -> None:
        self._engine: Engine = llm.engine
        self._timer = EngineTimer(llm.engine)

    def run(self, workload: Workload, cell: Cell, advance: Advance = lambda tokens: None) -> Measurement:
        """Generates the workload once.

        Args:
            workload: what to generate.
            cell: how many at a time, and how hot.
            advance: told of every step's new tokens.

        Raises:
            RequestError: a prompt that cannot be served.
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
        """Leaves the engine as it was."""
        self._timer.detach()


class _Run:
    """One pass over the requests."""

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
        """Runs to the end."""
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
            self.measured.arrived(count, now - running.last)
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
