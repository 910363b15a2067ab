"""What the automatic draft lengths lose to the best fixed one, without the machine's noise: recorded runs, replayed.

    python benchmarks/simulated_lengths.py --target build/grown-33m --methods ngram draft_model --rows 1 4

At every position of some texts the speculator drafts as deep as it may, once, and it is noted how many of the tokens come true;
a step's and a proposal's times by size are what the adaptive policy itself has measured, on this machine. Then the tests'
simulated batch (`tests/support/simulation.py`) runs through these texts, with every fixed length and with the real adaptive
policy, which sees the same times with 10 % of noise. What choosing itself costs is not in it: that is Python, and measured by
`never_slower.py`. `looked` is the share of steps in which depths were looked for anew.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import transformers
from never_slower import METHODS
from workloads import WORKLOADS

from specplug import LLM, SamplingParams, SpeculatorTraits, resolve_model
from specplug.request import Request
from specplug.speculation.adaptive import AdaptiveDraftLength
from specplug.speculation.draft_length import FixedDraftLength

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.simulation import Link, Simulation

_DEEPEST = 8
_WARM, _MEASURED, _SEEDS = 12, 36, 8
Trace = list[list[tuple[int, int, list[float]]]]
"""For each text and position: tokens drafted there, how many of them came true, and how likely each was to its speculator."""


@attrs.frozen
class Measured:
    """Seconds by size; between sizes on a line, of fewer rows in proportion."""

    seconds_of: Sequence[float]
    rows: int

    def at(self, size: float) -> float:
        """Seconds of a size for every row."""
        below = min(int(size), len(self.seconds_of) - 2)
        low, high = self.seconds_of[below], self.seconds_of[below + 1]
        return low + (size - below) * (high - low)


class MeasuredTarget(Measured):
    """Seconds of a target step."""

    def seconds(self, rows: int, nodes: int, step: int = 0) -> float:
        """See `support.simulation.Target`."""
        return self.at(nodes / self.rows)


@attrs.frozen
class MeasuredAsking(Measured):
    """Seconds of a proposal."""

    per_gap_token: float
    fill: float = 1.0
    cold: float = 1.0

    def seconds(self, rows: int, depth: int, gap: int, step: int = 0) -> float:
        """See `support.simulation.Asking`."""
        return self.at(max(depth, 1) - 1) * (0.6 + 0.4 * rows / self.rows) + (gap > 8) * gap * self.per_gap_token


class Replayed(Simulation):
    """A batch whose texts and drafts were recorded."""

    def __init__(self, trace: Trace, **options: Any) -> None:
        self._trace = trace
        super().__init__(**options)

    @property
    def num_looks(self) -> int:
        """How often it was looked for the best depths."""
        return self.policy.num_looks if isinstance(self.policy, AdaptiveDraftLength) else 0

    def _draft(self, request: Request, link: Link, depth: int) -> list[int]:
        drafted, accepted, _ = self._at(request)
        at = len(request.tokens)
        return [at + ahead if ahead < accepted else -1 for ahead in range(min(depth, drafted))]

    def _chance(self, request: Request, link: Link, ahead: int) -> float:
        chances = self._at(request)[2]
        return chances[ahead] if ahead < len(chances) else 1e-9

    def _at(self, request: Request) -> tuple[int, int, list[float]]:
        text = self._trace[request.number % len(self._trace)]
        return text[min(request.num_output_tokens - 1, len(text) - 1)]

    def _ask(self, index: int, link: Link, asked: Any) -> Any:
        answer = super()._ask(index, link, asked)
        for request in self.requests:
            if request.draft is not None and not len(request.draft):
                request.draft = None
        return answer


def record(llm: LLM, prompts: list[list[int]], tokens: int) -> Trace:
    """Drafts at every position of what the target says, and how many tokens of each come true."""
    engine, policy = llm.engine, llm.engine.chain.policy
    engine.chain.policy = FixedDraftLength()
    plain = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, num_speculative_tokens=0)
    once = attrs.evolve(plain, max_tokens=_DEEPEST + 4, num_speculative_tokens=_DEEPEST, detokenize=False)
    trace: Trace = []
    for number, output in enumerate(llm.generate(prompts, plain, use_tqdm=False)):
        said, text = output.outputs[0].token_ids, []
        for position in range(1, tokens):
            name = f"{number}-{position}"
            engine.add_request(name, [*prompts[number], *said[: position - 1]], once)
            engine.step()
            request = engine.scheduler.running[0]
            drafted = len(request.draft) if request.draft else 0
            scores = request.draft.scores if request.draft else None
            engine.step()
            text.append((drafted, request.num_output_tokens - 2, chances_of(scores or [])))
            engine.abort(name)
        trace.append(text)
    engine.chain.policy = policy
    return trace


def chances_of(scores: Sequence[float]) -> list[float]:
    """How likely each token of a chain is behind those before it, of cumulative logarithms."""
    return [math.exp(score - before) for score, before in zip(scores, [0.0, *scores], strict=False)]


def costs(llm: LLM, prompts: list[list[int]], rows: int, tokens: int) -> tuple[MeasuredTarget, MeasuredAsking]:
    """What the adaptive policy has measured once all prompts were served three times."""
    policy = llm.engine.chain.policy
    assert isinstance(policy, AdaptiveDraftLength)
    for _ in range(3):
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
    estimate, curve = policy.estimates[0], policy.targets[rows]
    target = [curve.seconds(nodes * rows) for nodes in range(_DEEPEST + 2)]
    asking = [estimate.seconds(rows, depth) for depth in range(1, _DEEPEST + 1)]
    return MeasuredTarget(target, rows), MeasuredAsking(asking, rows, estimate.catch_up)


def replay(
    trace: Trace, target: MeasuredTarget, asking: MeasuredAsking, traits: SpeculatorTraits, fixed: int | None, seed: int
) -> tuple[float, float]:
    """Tokens per second over plain decoding's, and the share of steps in which depths were looked for."""
    knows = any(chances for text in trace for _, _, chances in text)
    link = Link(asking, _unused, traits, num_tokens=_DEEPEST, chances=_unused if knows else None)
    batch = Replayed(
        trace,
        links=[link],
        target=target,
        rows=target.rows,
        fixed=fixed,
        length=len(trace[0]) + 1,
        seed=seed,
        noise=0.1,
    )
    batch.run(-(-_WARM // target.rows))
    looks, steps = batch.num_looks, batch.steps
    rate = batch.run(_MEASURED // target.rows)
    return rate / batch.plain(), (batch.num_looks - looks) / (batch.steps - steps)


def _unused(row: int, at: int) -> float:
    return 0.0  # what was recorded is taken instead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--draft", default="tiny", help="what draft_model and eagle3 draft with for another target")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["continuing", "editing"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(args.target))
    print(f"{'method':12} {'workload':11} rows  auto / best of all  looked  fixed lengths, of plain")
    for workload in args.workloads:
        prompts = WORKLOADS[workload](tokenizer, args.texts)
        for method in args.methods:
            keys = {**METHODS[method], "num_speculative_tokens": "auto"}
            if args.target != "tiny" and method != "ngram":
                keys["model"] = args.draft
            for rows in args.rows:
                options = {"max_num_seqs": rows, "max_model_len": 1024, "memory": "4GiB"}
                with LLM(args.target, speculative_config=keys, dtype="bfloat16", **options) as llm:
                    trace = record(llm, prompts, args.tokens)
                    target, asking = costs(llm, prompts, rows, args.tokens)
                    traits = llm.engine.chain.speculators[0].traits
                own = SpeculatorTraits(token_only=traits.token_only)
                fixed = [replay(trace, target, asking, own, depth, 0)[0] for depth in range(1, _DEEPEST + 1)]
                auto, looked = zip(
                    *(replay(trace, target, asking, own, None, seed) for seed in range(_SEEDS)), strict=True
                )
                share = statistics.mean(auto) / max(fixed)
                lengths = " ".join(f"{depth}: {rate:.2f}" for depth, rate in enumerate(fixed, start=1))
                print(
                    f"{method:12} {workload:11} {rows:4}  {share:18.3f}  {statistics.mean(looked):6.2f}  {lengths}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
