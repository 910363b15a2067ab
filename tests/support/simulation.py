"""A batch in simulated time: costs and texts are made up, the adaptive policy is real."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from specplug import SamplingParams, SpeculatorTraits
from specplug.contract.settings import SpeculativeConfig
from specplug.contract.types import Budget, Outcome
from specplug.plugins.registry import RegisteredSpeculator
from specplug.request import Request
from specplug.speculation.adaptive import AdaptiveDraftLength
from specplug.speculation.draft import Draft
from specplug.speculation.draft_length import SHORT_GAP, DraftLengthPolicy, FixedDraftLength, ProposeCall
from specplug.speculation.target_states.ring_buffer import WINDOW

Rate = Callable[[int, int], float]
"""(row number, position in the output) → the chance that a draft of the token there is right."""


@attrs.frozen
class Target:
    """Seconds of a target step: flat, then bound by computing; rows cost a little each, and verifying any draft a jump."""

    flat: float = 15e-3
    per_node: float = 0.2e-3
    per_row: float = 0.1e-3
    bound_from: int = 24
    per_bound_node: float = 0.45e-3
    jump: float = 0.0
    scale: Callable[[int], float] = lambda step: 1.0

    def seconds(self, rows: int, nodes: int, step: int = 0) -> float:
        size = rows + nodes
        bound = max(0, size - self.bound_from)
        seconds = self.flat + self.per_row * rows + self.per_node * size + self.per_bound_node * bound
        return self.scale(step) * seconds * (1.0 + self.jump * (nodes > 0))


@attrs.frozen
class Asking:
    """Seconds of a proposal, and how often there is one."""

    base: float = 20e-6
    per_depth: float = 0.0
    per_row: float = 5e-6
    per_gap_token: float = 0.0
    per_catch_up: float = 0.0  # a call in which any row catches up
    fill: float = 1.0
    cold: float = 1.0  # times as long, if it was not asked in the step before
    scale: Callable[[int], float] = lambda step: 1.0

    def seconds(self, rows: int, depth: int, gap: int, step: int = 0) -> float:
        own = self.base + self.per_depth * depth + self.per_row * rows + self.per_gap_token * gap
        return self.scale(step) * (own + (self.per_catch_up if gap > SHORT_GAP * rows else 0.0))


@attrs.define
class Link:
    """One simulated speculator."""

    asking: Asking
    rate: Rate
    traits: SpeculatorTraits
    num_tokens: int = 8
    calls: int = 0
    rows_asked: int = 0
    asked_at: int = -1
    lost: int = 0  # positions whose states were gone when it came to see the row
    blind: set[int] = attrs.field(factory=set)  # the rows they were of
    blind_share: float = 1.0  # of their drafts' chances that is left
    launch: float | None = None  # seconds after which its calls return; the next step waits for the rest
    chances: Rate | None = None  # what it takes a token's to be, if it knows, and stops where it is told to
    seen: dict[int, int] = attrs.field(factory=dict)

    @classmethod
    def tokens(cls, rate: Rate, **asking: float) -> Link:
        return cls(Asking(**asking), rate, SpeculatorTraits(token_only=True))

    @classmethod
    def model(cls, rate: Rate, share: float, target: Target, **options: Any) -> Link:
        """A draft model: so large a share of a target step for every token of a draft."""
        cost = share * target.seconds(1, 0)
        return cls(Asking(30e-6, cost, 10e-6, cost / 40), rate, SpeculatorTraits(), **options)

    @classmethod
    def head(cls, rate: Rate, share: float, target: Target, **options: Any) -> Link:
        """A draft model that reads the target's states, which are kept for a while."""
        link = cls.model(rate, share, target, **options)
        link.traits = SpeculatorTraits(hidden_states=("final",))
        return link


class Simulation:
    """Requests of equal length in a batch; whenever one ends, the next takes its place."""

    def __init__(
        self,
        links: Sequence[Link],
        *,
        target: Target,
        rows: int,
        fixed: int | None = None,
        length: int = 96,
        prompt: int = 128,
        noise: float = 0.12,
        seed: int = 0,
    ) -> None:
        self.links, self.target, self.rows, self.length, self.prompt = list(links), target, rows, length, prompt
        self.random = random.Random(seed)
        self.noise = noise
        self.fixed = fixed
        speculators = [
            RegisteredSpeculator(
                method=f"link {index}",
                config=SpeculativeConfig(f"link {index}", fixed or link.num_tokens, is_auto=fixed is None),
                instance=None,
                traits=link.traits,
                plan_memory=_no_hook,
                warmup=_no_hook,
                propose=_no_hook,
                verify=_no_hook,
                overrides_verify=False,
            )
            for index, link in enumerate(links)
        ]
        self.speculators = speculators
        self.policy: DraftLengthPolicy = FixedDraftLength() if fixed is not None else AdaptiveDraftLength(speculators)
        self.seconds = 0.0
        self.owed = 0.0  # of proposals that are still being computed
        self.tokens = 0
        self.steps = 0
        self.made = 0
        self.nodes: list[int] = []
        self.requests = [self._new() for _ in range(rows)]

    def resized(self, rows: int) -> Simulation:
        """The same policy, texts and costs, with another number of rows."""
        other = Simulation(
            self.links,
            target=self.target,
            rows=rows,
            fixed=self.fixed,
            length=self.length,
            prompt=self.prompt,
            noise=self.noise,
        )
        for request in self.requests:
            self.policy.finish(request)
        other.policy, other.speculators, other.made = self.policy, self.speculators, self.made
        other.requests = [other._new() for _ in range(rows)]
        return other

    def run(self, requests: int) -> float:
        """Tokens per second over so many more requests per row."""
        begin, tokens = self.seconds, self.tokens
        last = self.made + requests * self.rows
        while self.made < last:
            self.step()
        return (self.tokens - tokens) / (self.seconds - begin)

    def plain(self) -> float:
        """Tokens per second without any speculation, at the present speed."""
        return self.rows / self.target.seconds(self.rows, 0, self.steps)

    def step(self) -> None:
        nodes = sum(len(request.draft) for request in self.requests if request.draft)
        self.nodes.append(nodes)
        spent, self.owed = self.target.seconds(self.rows, nodes, self.steps) + self.owed, 0.0
        for request in self.requests:
            self._commit(request)
        self.policy.observe(self.requests, self._jitter(spent), decoding=True)
        self.steps += 1
        self.seconds += spent
        for place, request in enumerate(self.requests):
            if request.num_output_tokens >= self.length:
                for link in self.links:
                    link.seen.pop(request.number, None)
                self.policy.finish(request)
                self.requests[place] = self._new()
        self._propose()

    def _commit(self, request: Request) -> None:
        draft = request.draft
        taken = 0
        if draft is not None:
            at = len(request.tokens)
            while taken < len(draft) and draft.tokens[taken] == at + taken:
                taken += 1
            request.outcome = Outcome(draft.method, len(draft), tuple(range(taken)))
        else:
            request.outcome = None
        request.draft = None
        for _ in range(min(taken + 1, self.length - request.num_output_tokens)):
            request.tokens.append(len(request.tokens))
            self.tokens += 1
        request.num_computed = len(request.tokens) - 1

    def _propose(self) -> None:
        if not self.policy.begin(self.requests):
            return
        for index, (link, speculator) in enumerate(zip(self.links, self.speculators, strict=True)):
            left = [request for request in self.requests if request.draft is None]
            lengths = self.policy.plan(speculator, left, link.seen, lambda request: request.num_output_tokens == 1)
            asked = [
                (request, length)
                for request, length in zip(left, lengths, strict=True)
                if length or (length == 0 and not link.traits.token_only)
            ]
            spent, call = self._ask(index, link, asked) if asked else (0.0, None)
            if link.launch is not None:
                spent, self.owed = min(spent, link.launch), self.owed + max(0.0, spent - link.launch)
            self.seconds += spent
            self.policy.proposed(speculator, self._jitter(spent), call)
        drafts = self.policy.trim([request.draft for request in self.requests])
        for request, draft in zip(self.requests, drafts, strict=True):
            request.draft = draft
        self.policy.end(self.requests)

    def _ask(self, index: int, link: Link, asked: list[tuple[Request, int | Budget]]) -> tuple[float, ProposeCall]:
        gap = fed = 0
        depths: dict[int, int] = {}
        drafting: list[tuple[Request, int, Budget]] = []
        for request, wish in asked:
            missed = request.num_computed - link.seen.get(request.number, 0)
            if link.traits.needs_states and missed > WINDOW and request.num_output_tokens > 1:
                link.lost += missed - WINDOW
                link.blind.add(request.number)
                missed = WINDOW
            gap += missed
            fed += missed if missed > SHORT_GAP or not wish else 0
            link.seen[request.number] = request.num_computed
            depth = wish.max_depth if isinstance(wish, Budget) else wish
            assert depth <= (self.fixed or link.num_tokens)
            depth = min(depth, self.length - request.num_output_tokens - 1)
            if depth > 0:
                depths[request.number] = depth
            if depth > 0 and self.random.random() < link.asking.fill:
                drafting.append((request, depth, wish if isinstance(wish, Budget) else Budget(depth, depth)))
        lengths = [depth for _, depth, _ in drafting]
        scores: list[list[float]] = [[] for _ in drafting]
        if link.chances is not None:
            lengths, scores = self._stop(drafting, link)
        for (request, depth, _), length, own in zip(drafting, lengths, scores, strict=True):
            tokens = self._draft(request, link, length)
            request.draft = Draft(
                f"link {index}",
                tokens,
                scores=own or None,
                speculator=self.speculators[index],
                allowed=depth,
                proposed=length,
            )
            depths[request.number] = length
        deepest = max(depths.values(), default=0)
        link.calls += 1
        link.rows_asked += len(asked)
        allowed = max((depth for _, depth, _ in drafting), default=0)
        answer = ProposeCall(depths, 0 if link.traits.token_only else fed, allowed)
        slower = 1.0 if link.asked_at == self.steps - 1 else link.asking.cold
        link.asked_at = self.steps
        return slower * link.asking.seconds(len(asked), deepest, gap, self.steps), answer

    def _stop(self, drafting: Sequence[tuple[Request, int, Budget]], link: Link) -> tuple[list[int], list[list[float]]]:
        """How long each chain becomes where its tokens' chances are known, and its scores."""
        scores: list[list[float]] = [[] for _ in drafting]
        going = list(range(len(drafting)))
        while going:
            for place in going:
                own = scores[place]
                own.append((own[-1] if own else 0.0) + math.log(self._chance(drafting[place][0], link, len(own))))
            going = [place for place in going if len(scores[place]) < drafting[place][1]]
            known = [math.exp(scores[place][-1]) for place in going]
            going = list(itertools.compress(going, Budget.worth_extending([drafting[p][2] for p in going], known)))
        return [len(own) for own in scores], scores

    def _chance(self, request: Request, link: Link, ahead: int) -> float:
        """What a speculator takes the chance of a token to be."""
        assert link.chances is not None
        return link.chances(request.number, request.num_output_tokens + ahead)

    def _draft(self, request: Request, link: Link, depth: int) -> list[int]:
        at = len(request.tokens)
        share = link.blind_share if request.number in link.blind else 1.0
        rates = [share * link.rate(request.number, request.num_output_tokens + ahead) for ahead in range(depth)]
        return [at + ahead if self.random.random() < rate else -1 for ahead, rate in enumerate(rates)]

    def _new(self) -> Request:
        self.made += 1
        params = SamplingParams(max_tokens=self.length)
        tokens = list(range(self.prompt + 1))  # as after the step that computed the prompt
        request = Request("row", self.made, tokens, self.prompt, params, frozenset(), None)  # type: ignore[arg-type]
        request.num_computed = self.prompt
        return request

    def _jitter(self, seconds: float) -> float:
        spike = 2.5 if self.random.random() < 0.01 else 1.0
        return seconds * spike * self.random.lognormvariate(0.0, self.noise)


def _no_hook(**kwargs: Any) -> None:
    return None
