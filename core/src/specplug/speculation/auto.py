"""Budgets that make the most tokens per second of what is measured: `num_speculative_tokens: "auto"`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from specplug.plugins.registry import RegisteredSpeculator
from specplug.request import Request
from specplug.speculation.asked import Asked
from specplug.speculation.candidate import Candidate, budget_of, deepest_useful, tokens_left
from specplug.speculation.draft import Draft
from specplug.speculation.estimates import LinkEstimate, RowEstimate, estimate_of
from specplug.speculation.following import begins, follows, has_lost_states, is_about_to_lose_states, missed_tokens
from specplug.speculation.held_plan import HeldPlan
from specplug.speculation.lessons import Lessons
from specplug.speculation.policy import FixedBudget, Wish
from specplug.speculation.probing import Probing, vary
from specplug.speculation.prospect import Prospect, target_costs
from specplug.speculation.resting import Resting
from specplug.speculation.settling import SETTLED_STEPS, is_settled, settle
from specplug.speculation.trimming import keep_what_pays
from specplug.speculation.waking import choose_probes

_MOST_STEPS_LATE = 2


class AutoBudget:
    """Chooses every row's budget, zero and sleep included, from timings and acceptance. It never changes what is emitted.

    Each step it is told what the step before took and what became of its drafts (`observe`); then, for every speculator in
    turn, it divides budgets among the rows that want a draft (`plan`) and is told what asking took (`proposed`).

    A row drafts while that is expected to raise the tokens per second of the batch, and sleeps otherwise. A sleeping row is
    *probed* now and then, ever more rarely while probes fail, within a small share of the time (see `Probing`): a speculator
    that sees tokens alone is asked for a guess, which is compared with the text and never verified; any other drafts one level.

    Attributes:
        links: what is known of the speculators, in the order they are asked.
        targets: rows → seconds of a target step over its draft nodes.
        probing: the account that probes are paid from.
        step: the number of the step.
        num_looks: how often it was looked for the best depths.
    """

    def __init__(self, speculators: Sequence[RegisteredSpeculator]) -> None:
        self.links = [LinkEstimate.of(speculator) for speculator in speculators]
        self.targets = target_costs()
        self.probing = Probing()
        self.step = 0
        self.num_looks = 0
        self._fixed = FixedBudget()
        self._prospect = Prospect(0, self.targets)
        self._asked: list[tuple[Request, RowEstimate, int]] = []
        self._resting = Resting()
        self._lessons = Lessons()
        self._held: dict[int, HeldPlan] = {}

    def wish(self, request: Request, speculator: RegisteredSpeculator) -> Wish:
        """The upper bound, as in `BudgetPolicy.wish`; what decides is `plan`."""
        return self._fixed.wish(request, speculator)

    def retire(self, index: int) -> None:
        """A speculator is not asked any more."""
        self.links[index].retired = True

    def restart(self, request: Request) -> None:
        """A row was preempted: what speculators keep of it is gone, and it is computed anew."""
        self._held.clear()
        for row in request.estimates:
            row.settled_at, row.is_blind = -1, False

    def lose(self, request: Request, index: int) -> None:
        """Target states of a row were gone before a speculator was shown them."""
        self._row(request, index).is_blind = True

    def keeps_states(self, index: int, request: Request) -> bool:
        """Whether target states that a speculator has not seen are worth keeping: of a row that is lost to it, hardly."""
        return not (self.links[index].acceptance.is_hopeless and self._row(request, index).is_blind)

    def fork(self, parent: Request, child: Request) -> None:
        """A sequence starts on another one's prompt, and on what speculators stored for that."""
        for index, row in enumerate(parent.estimates):
            self._row(child, index).is_blind = row.is_blind

    # ---- before the speculators are asked -------------------------------------------------------------------------

    def rests(self, requests: Sequence[Request]) -> bool:
        """Whether this step needs no budgets: every row sleeps, as it did before, and none is to be woken yet."""
        if self._resting.holds(requests, self.step):
            return True
        for each in self._resting.take_timings():
            self._time(*each)
        return False

    def begin(self, requests: Sequence[Request]) -> None:
        """Begins a step's budgets."""
        if self._lessons.since is not None and self.step - self._lessons.since >= min(
            len(requests) - 1, _MOST_STEPS_LATE
        ):
            self._learn()
        self._resting.begin()
        self.probing.begin()
        self._prospect = Prospect(sum(request.num_pending == 1 for request in requests), self.targets)

    def plan(
        self,
        index: int,
        requests: Sequence[Request],
        seen: Mapping[int, int],
        has_all_states: Callable[[Request], bool],
    ) -> list[Wish]:
        """What each row may draft with one speculator; see `BudgetPolicy.wish`.

        Args:
            index: the speculator's place in the chain.
            requests: the rows that it may be asked for.
            seen: request number → the first position that the speculator was not shown yet.
            has_all_states: whether the target's states of a row are there from its first token on.
        """
        held = self._held.get(index)
        if held is not None and held.holds(requests, self.step):
            self._asked = held.asked
            self._resting.forbid()
            return held.wishes
        self._held.pop(index, None)
        self._learn()
        link = self.links[index]
        self._asked = []
        wishes: list[Wish] = [None] * len(requests)
        candidates: list[Candidate] = []
        for place, request in enumerate(requests):
            gap = missed_tokens(link, request.num_computed, seen.get(request.number, 0))
            if request.num_pending > 1:
                if self._follows(link, request, has_begun=request.number in seen):
                    wishes[place] = 0
            elif limit := deepest_useful(link, request):
                candidate = Candidate(place, request, self._row(request, index), limit, gap)
                candidates.append(candidate)
                if not link.is_auto:
                    wishes[place] = self._fixed.wish(request, link.speculator)
                    self._ask(candidate, limit)
                elif begins(link, candidate, seen) and has_all_states(request):
                    if self._follows(link, request, has_begun=False):
                        wishes[place] = candidate.gap = 0
                        candidate.row.is_owed = True
                elif has_lost_states(link, candidate, seen):
                    candidate.row.is_blind = True
        if candidates and link.is_auto:
            self._divide(index, requests, candidates, wishes)
        return wishes

    def _divide(self, index: int, requests: Sequence[Request], candidates: list[Candidate], wishes: list[Wish]) -> None:
        """Gives a budget to every row that it pays for, and to some others a probe."""
        link, prospect = self.links[index], self._prospect
        if not is_settled(link, candidates, self.step):
            self.num_looks += 1
            settle(index, self.links, candidates, prospect, self.probing, self.step)
        depths = [min(c.row.depth, c.limit) for c in candidates]
        steps = 0
        if any(depths):
            self._resting.forbid()
            depths, steps = vary(depths, [c.limit for c in candidates], self.step, prospect.timings, link.gain)
        idle = []
        for candidate, depth in zip(candidates, depths, strict=True):
            if depth:
                candidate.row.probes, candidate.row.is_owed, candidate.row.guess = False, False, None
                wishes[candidate.place] = budget_of(link, depth)
                self._ask(candidate, depth)
            elif not candidate.row.depth:
                idle.append(candidate)
        if idle:
            self._probe(link, idle, wishes)
        elif len(candidates) == len(requests):
            until = min(self.step + steps, link.settled_until)
            self._held[index] = HeldPlan([request.number for request in requests], wishes, self._asked, until)

    def _probe(self, link: LinkEstimate, idle: list[Candidate], wishes: list[Wish]) -> None:
        """Tries some of the rows that sleep."""
        depths = [depth for _, _, depth in self._asked]
        chosen, later = choose_probes(link, self._prospect, self.probing, idle, depths, self.step)
        self._resting.wake(later, probes=bool(chosen))
        for candidate in chosen:
            candidate.row.probes, candidate.row.is_owed = True, False
            candidate.row.wake_at = self.step + 1
            wishes[candidate.place] = budget_of(link, 1)
            self._asked.append((candidate.request, candidate.row, 1))
        for candidate in idle:
            if is_about_to_lose_states(link, candidate) and wishes[candidate.place] is None:
                advance = self.probing.advance(tokens_left(candidate.request))
                if self.probing.affords(link.feed * candidate.gap, advance):
                    wishes[candidate.place] = 0

    # ---- after ----------------------------------------------------------------------------------------------------

    def proposed(self, index: int, seconds: float, asked: Asked | None) -> None:
        """A speculator was asked, or was to be; guesses that are not to be verified are taken out of `request.draft`.

        Args:
            index: its place in the chain.
            seconds: what planning and asking took.
            asked: what came of it; None where it was not called, or failed: then nothing is learned.
        """
        link, prospect = self.links[index], self._prospect
        prospect.spent += seconds if asked is None else link.observe_proposal(asked, seconds, self.step)
        if asked is None:
            if not self._resting.is_forbidden:
                self.probing.charge(seconds)
            return
        if not self._resting.is_forbidden:
            self.probing.settle(seconds)
        is_last = index + 1 == len(self.links)
        drafts: list[Draft] = []
        refused = 0
        for request, row, depth in self._asked:
            if request.number not in asked.depths:
                continue
            draft = request.draft
            if draft is None:
                if not row.probes:
                    refused += 1
                elif not prospect.is_negligible(seconds):
                    row.misses += 1
                    row.wake_at = self.step + link.rest(row.misses)
                continue
            drafts.append(draft)
            row.stops = draft.is_scored_chain
            if row.probes and (link.compares and draft.probs is None):
                roots = [t for t, parent in zip(draft.tokens, draft.parent_list(), strict=True) if parent < 0]
                row.guess = (len(request.tokens), frozenset(roots))
                request.draft = None
                continue
            prospect.nodes += len(draft)
            if not is_last:
                prospect.tokens += sum(link.gains(row, depth, 0.0, request.num_output_tokens)[: len(draft)])
        link.observe_drafts(drafts, refused, asked)

    def trim(self, drafts: Sequence[Draft | None]) -> list[Draft | None]:
        """Keeps the nodes of scored drafts that are worth verifying."""
        if not self.targets or not any(draft is not None and draft.scores is not None for draft in drafts):
            return list(drafts)
        return keep_what_pays(drafts, self.links, self._prospect)

    def end(self, requests: Sequence[Request]) -> None:
        """Notes what the next step will verify, and how long rows that all sleep are left alone."""
        for request in requests:
            draft = request.draft
            if draft is not None:
                self._row(request, draft.link).draft = draft
        if not self._resting.is_forbidden and not self._resting.probes:
            self._plan_rest(requests)

    def observe(self, requests: Sequence[Request], seconds: float, *, decoding: bool) -> None:
        """Takes in a step: its time, and what became of drafts.

        Args:
            requests: all its rows.
            seconds: from its begin until its tokens were known.
            decoding: whether every row ran one pending token and nothing else than its draft.
        """
        self.step += 1
        if self._resting.is_resting:  # taken in later, many at once: by themselves each would find cold caches
            self._resting.keep_timing(len(requests), seconds, decoding=decoding)
            return
        nodes, is_typical = 0, True
        for request in requests:
            outcome = request.outcome
            if outcome is not None:
                nodes += outcome.num_nodes
                link, row = self.links[request.outcome_link], self._row(request, request.outcome_link)
                position = max(request.num_output_tokens - len(outcome.accepted) - 1, 0)
                self._lessons.add(link, row, outcome.accepted, outcome.num_nodes, self.step, position)
                is_typical = is_typical and (link.is_warm or not link.was_warm(self.step))
            for index, row in enumerate(request.estimates):
                if row.guess is not None:
                    self._compare(request, row, index)
        self._time(len(requests), seconds, decoding and is_typical, nodes)
        if self._resting.probes:
            self._learn()
            for request in requests:
                for row in request.estimates:
                    self._resting.wake(row.wake_at)
            self._plan_rest(requests)

    def _time(self, rows: int, seconds: float, decoding: bool, nodes: int = 0) -> None:
        """Takes in a step's time."""
        if decoding:
            self.targets.observe(rows, nodes, seconds)
        self.probing.earn(seconds)

    def _learn(self) -> None:
        """Takes in what became of drafts; where that was unlikely depths are looked for at once."""
        if self._lessons.take_in():
            self._held.clear()
        self.probing.be_thrifty(min(link.acceptance.hopeless_misses for link in self.links))

    def _compare(self, request: Request, row: RowEstimate, index: int) -> None:
        """Takes in whether a guess that was not verified came true."""
        assert row.guess is not None
        length, candidates = row.guess
        if len(request.tokens) > length:
            row.guess = None
            hit = request.tokens[length] in candidates
            position = length - request.num_prompt_tokens
            self.links[index].learn(row, int(hit), rejected=not hit, step=self.step, position=position)

    # ---- details --------------------------------------------------------------------------------------------------

    def _row(self, request: Request, index: int) -> RowEstimate:
        return estimate_of(request, index, len(self.links))

    def _plan_rest(self, requests: Sequence[Request]) -> None:
        """Rows rest: where drafts are far from paying longer than where the next look at costs may decide otherwise."""
        is_close = any(link.is_close for link in self.links if not link.retired)
        self._resting.plan(requests, self.step, SETTLED_STEPS if is_close else None)

    def _ask(self, candidate: Candidate, depth: int) -> None:
        """Notes that a row drafts."""
        self._asked.append((candidate.request, candidate.row, depth))
        self._resting.forbid()

    def _follows(self, link: LinkEstimate, request: Request, *, has_begun: bool) -> bool:
        prospect = self._prospect if self._prospect.rows else Prospect(1, self.targets)
        return follows(link, request, prospect, self.probing, has_begun=has_begun)
