"""`num_speculative_tokens: "auto"` in a running engine: outputs, calls, caps and the configuration."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from specplug import LLM, Proposal, SamplingParams, SpeculatorTraits, hookimpl
from specplug.config.speculative import DEFAULT_MAX_SPECULATIVE_TOKENS, parse_speculative_config
from specplug.errors import ConfigurationError, PluginError
from specplug.speculation.adaptive import AdaptiveDraftLength
from specplug.speculation.draft_length import FixedDraftLength, ProposeCall
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator, TreeSpeculator

PROMPTS = [[5, 9, 2, 7, 1], [3, 3, 8], [11, 4, 6, 6, 2, 9, 8], [1, 2]]
LENGTH = 60
GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
SEEDED = [SamplingParams(temperature=0.9, seed=seed, max_tokens=LENGTH, ignore_eos=True) for seed in range(4)]
Options = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target"), "llama")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("draft"), "llama", seed=1)


def run(folder: Path, params: Any = GREEDY, repeats: int = 1, **options: Any) -> tuple[list[list[int]], LLM]:
    llm = LLM(folder, skip_tokenizer_init=True, memory="64MiB", max_model_len=128, strict=True, **options)
    for _ in range(repeats):
        outputs = llm.generate(PROMPTS, params)
    return [output.outputs[0].token_ids for output in outputs], llm


def auto(make: Any, **keys: Any) -> Options:
    return {"plugins": {"own": make}, "speculative_config": {"method": "own", **keys}}


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, list[list[int]]]:
    found = {}
    for name, params in {"greedy": GREEDY, "seeded": SEEDED}.items():
        found[name], llm = run(folder, params)
        llm.close()
    return found


def speculators(folder: Path, small: Path, expected: list[list[int]]) -> dict[str, Options]:
    oracle = Oracle([p + e for p, e in zip(PROMPTS, expected, strict=True)], VOCABULARY, hit_rate=0.8)
    return {
        "tokens": auto(lambda c, t: TokenSpeculator(oracle)),
        "tree": auto(lambda c, t: TreeSpeculator(oracle, (1,), 9)),
        "model": auto(lambda c, t: ModelSpeculator(t, folder, c.num_speculative_tokens)),
        "poor model": auto(lambda c, t: ModelSpeculator(t, small, c.num_speculative_tokens)),
        "chain": {
            "plugins": {
                "first": lambda c, t: TokenSpeculator(oracle),
                "next": lambda c, t: ModelSpeculator(t, small, c.num_speculative_tokens),
            },
            "speculative_config": {"method": "first", "fallback": {"method": "next"}},
        },
        "fixed and auto": {
            "plugins": {
                "first": lambda c, t: TokenSpeculator(oracle),
                "next": lambda c, t: ModelSpeculator(t, folder, c.num_speculative_tokens),
            },
            "speculative_config": {"method": "first", "num_speculative_tokens": 3, "fallback": {"method": "next"}},
        },
    }


@pytest.mark.parametrize(
    "name",
    slow_except(["tree", "poor model", "chain", "tokens", "model", "fixed and auto"], "tree", "poor model", "chain"),
)
@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_output_is_plain_decodings(
    folder: Path, small: Path, plain: dict[str, list[list[int]]], kind: str, name: str
) -> None:
    options = speculators(folder, small, plain[kind])[name]
    got, llm = run(folder, GREEDY if kind == "greedy" else SEEDED, repeats=3, **options)
    stats = llm.engine.stats
    assert isinstance(llm.engine.chain.policy, AdaptiveDraftLength)
    llm.close()
    assert got == plain[kind]
    assert stats.num_draft_tokens > 0


class Useless:
    """Drafts what the target has just refused to say; counts the rows it is asked for."""

    def __init__(self, traits: SpeculatorTraits, size: int = 0) -> None:
        self.traits = traits
        self.rows = 0
        self.work = torch.zeros(size, size)

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        self.rows += sum(row.budget.max_nodes > 0 for row in batch.rows)
        if len(self.work):
            for _ in range(max((row.budget.max_depth for row in batch.rows), default=0)):
                self.work = self.work @ self.work
        return Proposal([[VOCABULARY - 1] * min(row.budget.max_nodes, row.budget.max_depth) for row in batch.rows])


class Attentive(Useless):
    """Notes the positions of which it was never shown the states, though it was shown some before and after."""

    def __init__(self) -> None:
        super().__init__(SpeculatorTraits(hidden_states=(1,)))
        self.shown: dict[int, int] = {}
        self.missed = self.calls = 0

    @hookimpl
    def propose(self, batch: Any) -> Proposal:
        for row in batch.rows:
            if not row.is_new:
                self.missed += row.new_positions.start - self.shown[row.row_id]
            self.shown[row.row_id] = row.new_positions.stop
            self.calls += 1
        return super().propose(batch)


def test_states_of_rows_that_rest_are_kept_until_they_are_shown(folder: Path) -> None:
    attentive = Attentive()
    few = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)  # fewer than positions are kept
    _, llm = run(folder, few, repeats=6, **auto(lambda c, t: attentive))
    rested = llm.engine.num_steps - llm.engine.chain.policy.num_looks
    llm.close()
    assert rested > 100
    assert attentive.calls > 20
    assert attentive.missed == 0


@pytest.mark.parametrize("traits", [SpeculatorTraits(), SpeculatorTraits(hidden_states=(1,))])
def test_a_useless_speculator_is_hardly_asked(
    folder: Path, plain: dict[str, list[list[int]]], traits: SpeculatorTraits
) -> None:
    useless = Useless(traits, size=400)
    assert not any(VOCABULARY - 1 in tokens for tokens in plain["greedy"])
    got, llm = run(folder, repeats=2, **auto(lambda c, t: useless))
    useless.rows, steps = 0, llm.engine.num_steps
    llm.generate([PROMPTS[0]] * 4, GREEDY)
    steps = llm.engine.num_steps - steps
    llm.close()
    assert got == plain["greedy"]
    assert useless.rows < 0.2 * 4 * steps


def test_guesses_are_not_verified(folder: Path) -> None:
    """A useless speculator that sees tokens alone is asked, but the target does not pay for it."""
    useless = Useless(SpeculatorTraits(token_only=True))
    _, llm = run(folder, repeats=4, **auto(lambda c, t: useless))
    before = llm.engine.stats.num_draft_tokens
    llm.generate(PROMPTS, GREEDY)
    drafted = llm.engine.stats.num_draft_tokens - before
    llm.close()
    assert drafted < 0.2 * len(PROMPTS) * LENGTH


def test_a_row_that_wakes_is_caught_up(folder: Path, plain: dict[str, list[list[int]]]) -> None:
    """The speculator itself checks that no position is shown twice and that states come with every position shown."""
    oracle = Oracle([p + e for p, e in zip(PROMPTS, plain["greedy"], strict=True)], VOCABULARY, hit_rate=0.3, seed=3)
    speculator = TreeSpeculator(oracle, (0, "final"), 9)
    got, llm = run(folder, repeats=3, **auto(lambda c, t: speculator))
    llm.close()
    assert got == plain["greedy"]
    assert speculator.histories


def test_requests_cap_it_and_opt_out(folder: Path, plain: dict[str, list[list[int]]]) -> None:
    oracle = Oracle([p + e for p, e in zip(PROMPTS, plain["greedy"], strict=True)], VOCABULARY, hit_rate=1.0)
    caps = [None, 0, 2, 1]
    params = [
        SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, num_speculative_tokens=cap) for cap in caps
    ]
    with LLM(
        folder, skip_tokenizer_init=True, memory="64MiB", strict=True, **auto(lambda c, t: TokenSpeculator(oracle))
    ) as llm:
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    assert [output.token_ids for output in outputs] == plain["greedy"]
    for cap, output in zip(caps, outputs, strict=True):
        assert len(output.metrics.acceptance_histogram) <= 1 + (DEFAULT_MAX_SPECULATIVE_TOKENS if cap is None else cap)
    assert outputs[1].metrics.num_draft_tokens == 0


def test_the_bound_holds(folder: Path, plain: dict[str, list[list[int]]]) -> None:
    asked: list[int] = []

    class Bounded(TokenSpeculator):
        @hookimpl
        def propose(self, batch: Any) -> Proposal:
            asked.extend(row.budget.max_nodes for row in batch.rows)
            return TokenSpeculator.propose(self, batch)

    oracle = Oracle([p + e for p, e in zip(PROMPTS, plain["greedy"], strict=True)], VOCABULARY, hit_rate=1.0)
    for key, most in (({"max_num_speculative_tokens": 2}, 2), ({"num_speculative_tokens": 3}, 3)):
        asked.clear()
        _, llm = run(folder, **auto(lambda c, t: Bounded(oracle), **key))
        llm.close()
        assert max(asked) == most


def test_a_plugin_names_its_own_bound(folder: Path) -> None:
    def plugin(most: Any) -> Any:
        module = types.SimpleNamespace(max_num_speculative_tokens=most)
        seen: list[int] = []

        class Plugin:
            max_num_speculative_tokens = most

            @hookimpl
            def load_speculator(self, config: Any, target: Any) -> Any:
                seen.append(config.num_speculative_tokens)
                return Useless(SpeculatorTraits(token_only=True))

        module.seen, module.plugin = seen, Plugin()
        return module

    for keys, expected in (
        ({}, 13),
        ({"num_speculative_tokens": "auto"}, 13),
        ({"max_num_speculative_tokens": 4}, 4),
        ({"num_speculative_tokens": 6}, 6),
    ):
        made = plugin(13)
        LLM(
            folder,
            skip_tokenizer_init=True,
            memory="64MiB",
            plugins={"own": made.plugin},
            speculative_config={"method": "own", **keys},
        ).close()
        assert made.seen == [expected]
    with pytest.raises(PluginError, match="max_num_speculative_tokens='many'"):
        LLM(folder, memory="64MiB", plugins={"own": plugin("many").plugin}, speculative_config={"method": "own"})


def test_a_number_is_taken_as_it_is(folder: Path) -> None:
    useless = Useless(SpeculatorTraits(token_only=True))
    _, llm = run(folder, **auto(lambda c, t: useless, num_speculative_tokens=4))
    assert isinstance(llm.engine.chain.policy, FixedDraftLength)
    llm.close()
    assert useless.rows >= len(PROMPTS) * (LENGTH - 2)


def test_the_configuration_is_parsed() -> None:
    def parsed(**keys: Any) -> tuple[int, bool, bool]:
        config = parse_speculative_config({"method": "ngram", **keys})
        assert config is not None
        return config.num_speculative_tokens, config.is_auto, config.is_bounded

    assert parsed() == (DEFAULT_MAX_SPECULATIVE_TOKENS, True, False)
    assert parsed(num_speculative_tokens="auto") == (DEFAULT_MAX_SPECULATIVE_TOKENS, True, False)
    assert parsed(max_num_speculative_tokens=3) == (3, True, True)
    assert parsed(num_speculative_tokens="auto", max_num_speculative_tokens=12) == (12, True, True)
    assert parsed(num_speculative_tokens=5) == (5, False, True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"num_speculative_tokens": "Auto"},
            "num_speculative_tokens='Auto': expected an integer of at least 1, or 'auto'",
        ),
        ({"num_speculative_tokens": None}, "num_speculative_tokens=None: expected an integer"),
        ({"num_speculative_tokens": 4, "max_num_speculative_tokens": 8}, "with num_speculative_tokens=4 leave it out"),
        ({"max_num_speculative_tokens": 0}, "max_num_speculative_tokens=0: expected an integer of at least 1"),
        ({"max_num_speculative_tokens": True}, "max_num_speculative_tokens=True: expected an integer of at least 1"),
        (
            {"max_num_speculative_tokens": "auto"},
            "max_num_speculative_tokens='auto': expected an integer of at least 1",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(keys: Options, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse_speculative_config({"method": "ngram", **keys})
    assert message in str(error.value)


def test_what_was_not_asked_teaches_nothing(folder: Path, small: Path) -> None:
    """Prompts that are taken in beside drafts, rows that were given no room, and failed calls are no prices of drafts."""
    _, llm = run(folder, **auto(lambda c, t: ModelSpeculator(t, small, c.num_speculative_tokens)))
    policy = llm.engine.chain.policy
    assert isinstance(policy, AdaptiveDraftLength)
    (estimate,) = policy.estimates
    price, before = estimate.seconds(1, 1), estimate.catch_up.seconds(512)
    assert price > 0
    for _ in range(10):
        policy.proposed(estimate.speculator, 100 * price, ProposeCall({7: 1}, catch_up=512))
    assert estimate.seconds(1, 1) == price
    assert estimate.catch_up.seconds(512) > before
    for call in (None, ProposeCall({})):
        policy.proposed(estimate.speculator, 0.0, call)
    assert estimate.seconds(1, 1) == price
    llm.close()


def test_taking_in_prompts_alone_teaches_what_it_takes(folder: Path) -> None:
    """Else a speculator that is only ever shown prompts would seem to take them in for nothing, and be shown all of them."""
    _, llm = run(folder, **auto(lambda c, t: Useless(SpeculatorTraits(hidden_states=(1,)))))
    policy = AdaptiveDraftLength(llm.engine.chain.speculators)
    policy.begin([])
    policy.proposed(llm.engine.chain.speculators[0], 0.5, ProposeCall({}, catch_up=500))
    llm.close()
    assert policy.estimates[0].catch_up.seconds(100) == pytest.approx(0.1)
