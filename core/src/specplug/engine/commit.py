"""What a verified step does to requests: new tokens, the KV entries to move, log-probabilities, and what is delivered."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from specplug.contract.types import Outcome
from specplug.contract.verification import Verdict
from specplug.engine.target_step import TargetStep
from specplug.engine.trace import Tracer
from specplug.model.runner import ModelRunner
from specplug.request import Request, StepOutput
from specplug.sampling.logprobs import gather_logprobs
from specplug.speculation.target_states.store import TargetStateStore
from specplug.stats import SpeculationStats

_OWN: list[str | None] = [None]


@attrs.define(eq=False)  # several per row and step: frozen takes twice as long
class Committed:
    """What a step committed for one request, before it is counted and its text is decoded.

    Attributes:
        request: the request.
        first: the index of its first new token.
        sources: for each new token the method that drafted it; None for the target's own.
        method: of the draft that was verified; empty if there was none.
        num_nodes: of that draft.
        num_accepted: how many of the new tokens are accepted nodes.
    """

    request: Request
    first: int
    sources: list[str | None]
    method: str = ""
    num_nodes: int = 0
    num_accepted: int = 0

    @property
    def new_tokens(self) -> list[int]:
        """The committed ids."""
        return self.request.tokens[self.first : self.first + len(self.sources)]

    def deliver(self, total: SpeculationStats) -> StepOutput:
        """Counts them, and decodes their text.

        Args:
            total: the engine's counters.
        """
        request, taken = self.request, len(self.sources)
        for stats in (request.stats, total):
            stats.record(self.num_nodes, self.num_accepted, self.method)
        texts: list[str] = []
        if request.text is not None and not request.error:
            try:
                texts = request.text.take(taken)
            except Exception as error:  # the tokenizer fails on its own ids
                request.fail(error)
        return StepOutput(request, self.new_tokens, self.sources, texts)


class StepOutputs:
    """The outputs of the current step. On a GPU those of one step are delivered once the next one's forward runs.

    Args:
        total: the engine's counters of speculation.

    Attributes:
        total: see above.
        num_tokens: how many tokens have been committed.
    """

    def __init__(self, total: SpeculationStats) -> None:
        self.total = total
        self.num_tokens = 0
        self._committed: list[Committed | StepOutput] = []
        self._delivered: dict[int, StepOutput] = {}  # by the request's number

    def add(self, entry: Committed | StepOutput) -> None:
        """Takes in what was committed, or an output that has been counted and decoded."""
        self._committed.append(entry)
        self.num_tokens += len(entry.sources)

    def has(self, request: Request) -> bool:
        """Whether there is an output of a request."""
        return request.number in self._delivered or any(entry.request is request for entry in self._committed)

    def deliver_ended(self) -> None:
        """Delivers what was committed for requests that have ended: nobody may learn of an end before the last tokens."""
        ended = [entry for entry in self._committed if entry.request.is_finished]
        if ended:
            self._committed = [entry for entry in self._committed if not entry.request.is_finished]
            self._deliver(ended)

    def deliver(self) -> None:
        """Counts what was committed, decodes its text, and hands it to whoever listens."""
        committed, self._committed = self._committed, []
        self._deliver(committed)

    def _deliver(self, entries: Sequence[Committed | StepOutput]) -> None:
        for entry in entries:
            output = entry.deliver(self.total) if isinstance(entry, Committed) else entry
            before = self._delivered.get(output.request.number)
            self._delivered[output.request.number] = output if before is None else before.joined(output)
            if output.request.listener is not None:
                output.request.listener.add(output)

    def drop(self, request: Request) -> None:
        """Forgets what would be returned of a request that was aborted; listeners have had it."""
        self._delivered.pop(request.number, None)

    def take(self) -> list[StepOutput]:
        """What was delivered since the last call, one output per request."""
        delivered, self._delivered = self._delivered, {}
        return list(delivered.values())


class Committer:
    """Commits what verification decided.

    Args:
        runner: the target, whose KV cache holds the drafts.
        states: the target states that speculators declared.
        outputs: receives what is committed.
        tracer: told of the requests that are traced.
    """

    def __init__(self, runner: ModelRunner, states: TargetStateStore, outputs: StepOutputs, tracer: Tracer) -> None:
        self._runner = runner
        self._states = states
        self._outputs = outputs
        self._tracer = tracer

    def commit(self, target: TargetStep, verdict: Verdict) -> None:
        """Appends accepted tokens, makes their KV contiguous, and records their target states."""
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
                draft = request.draft
                if draft is not None and draft.parents is not None:
                    moves += kv_moves(request, start + row.num_tokens, path)
                self._runner.keep(request.slot, path)
                committed = commit_tokens(request, path, next_token)
                if request.params.logprobs is not None:
                    score_output(committed, target.logits, [entry, *(entry + 1 + node for node in path)])
                if request.is_traced:
                    entries = target.logits[entry : entry + 1 + (0 if draft is None else len(draft))]
                    output = committed.deliver(self._outputs.total)
                    self._outputs.add(self._tracer.record(output, draft, path, entries, row.num_tokens))
                else:
                    self._outputs.add(committed)
            request.num_computed = start + len(packed)
            final[request.slot] = (range(start, request.num_computed), packed)
        if moves:
            self._runner.cache.move([source for source, _ in moves], [destination for _, destination in moves])
        self._states.record(target.captured, final, drafted)


def commit_tokens(request: Request, path: Sequence[int], next_token: int) -> Committed:
    """Appends the accepted path of a request's draft and the next token.

    Args:
        request: the request; its draft is consumed.
        path: the accepted nodes of its draft.
        next_token: the token after them.
    """
    draft = request.draft
    before = len(request.tokens)
    tokens, sources = [next_token], _OWN
    if path and draft is not None:
        drafted = draft.tokens
        tokens = [*(drafted[node] for node in path), next_token]
        sources = [*[draft.method] * len(path), None]
    try:
        request.append(tokens, sources)
    except Exception as error:  # the tokenizer fails on its own ids
        request.fail(error)
    sources = sources[: len(request.tokens) - before]
    request.draft = None
    if draft is None:
        request.outcome = None
        return Committed(request, before, sources)
    request.outcome = Outcome(draft.method, len(draft), tuple(path), tuple(draft.tokens))
    return Committed(request, before, sources, draft.method, len(draft), min(len(sources), len(path)))


def kv_moves(request: Request, first: int, path: Sequence[int]) -> list[tuple[int, int]]:
    """KV slots (from, to) that make an accepted path contiguous from position `first` on; a chain needs none."""
    assert request.table is not None
    slots = request.table.slots
    moves = []
    for depth, node in enumerate(path):
        if node != depth:
            source, destination = first + node, first + depth
            moves.append((slots(source, source + 1)[0], slots(destination, destination + 1)[0]))
    return moves


def score_output(committed: Committed, logits: torch.Tensor, entries: list[int]) -> None:
    """Stores the log-probabilities of new tokens."""
    request, tokens = committed.request, committed.new_tokens
    count = request.params.logprobs
    assert count is not None
    try:
        request.logprobs += gather_logprobs(logits[entries[: len(tokens)]], tokens, count)
    except Exception as error:  # for example, too little memory for those of the whole vocabulary
        request.fail(error)


def score_prompts(target: TargetStep) -> None:
    """Stores the log-probabilities of prompt tokens, if they were requested."""
    for request, entry, positions in target.scored:
        first = len(request.prompt_logprobs) + 1
        tokens = request.tokens[first : first + positions]
        count = request.params.prompt_logprobs
        assert count is not None
        try:
            request.prompt_logprobs += gather_logprobs(target.logits[entry : entry + positions], tokens, count)
        except Exception as error:
            request.fail(error)
