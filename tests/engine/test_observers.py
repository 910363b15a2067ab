"""Wrappers around hooks look on: whatever they do, outputs, drafts and the plugins they wrap stay what they are."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specplug import LLM, Proposal, SamplingParams, Verdict, hookimpl
from specplug.errors import PluginError, SpecplugError
from support.marks import slow_except
from support.models import VOCABULARY, save_model
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator

PROMPTS = [[5, 9, 2, 7, 1], [3, 3, 8]]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=4, max_tokens=24, ignore_eos=True)
HOOKS = ("load_speculator", "plan_memory", "warmup", "propose", "verify")


def raises_before() -> Any:
    raise RuntimeError("before")
    yield


def raises_after() -> Any:
    yield
    raise RuntimeError("after")


def leaves_before() -> Any:
    raise SystemExit(3)
    yield


def leaves_after() -> Any:
    yield
    raise SystemExit(3)


def yields_twice() -> Any:
    result = yield
    yield
    return result


def yields_never() -> Any:
    return
    yield


def returns_nothing() -> Any:
    yield


def returns_a_lie() -> Any:
    result = yield
    rows = len(result.next_tokens) if isinstance(result, Verdict) else 1
    if isinstance(result, Verdict):
        return Verdict([[]] * rows, [7] * rows)
    return Proposal([[7]] * len(result.tokens)) if isinstance(result, Proposal) else object()


def alters_in_place() -> Any:
    result = yield
    if isinstance(result, Verdict):
        result.next_tokens[0] = 7  # type: ignore[index]
    return result


FAULTS = {
    raises_before: "raised RuntimeError: before",
    raises_after: "raised RuntimeError: after",
    leaves_before: "raised SystemExit: 3",
    leaves_after: "raised SystemExit: 3",
    yields_twice: "yielded twice",
    yields_never: "did not yield",
    returns_nothing: "returned a different object (NoneType) than `yield` gave",
    returns_a_lie: "returned a different object",
}


def observer(hook: str, act: Callable[[], Any]) -> Any:
    """An object that wraps one hook."""

    class Observer:
        @hookimpl(wrapper=True, specname=hook)
        def wrapped(self) -> Any:
            return (yield from act())

    return Observer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target"), "llama")


def run(folder: Path, kind: str, *, strict: bool = False, **observers: Any) -> tuple[list[list[int]], int]:
    """What every request gives, greedy and sampled, and how many draft tokens were accepted."""
    oracle = Oracle([], VOCABULARY)
    make = {
        "tokens": lambda c, t: TokenSpeculator(oracle),
        "model": lambda c, t: ModelSpeculator(t, folder, c.num_speculative_tokens),
    }
    speculative = {"method": kind, "num_speculative_tokens": 3} if kind != "plain" else None
    plugins = {**({kind: make[kind]} if kind in make else {}), **observers}
    with LLM(
        folder,
        skip_tokenizer_init=True,
        memory="64MiB",
        strict=strict,
        plugins=plugins,
        speculative_config=speculative,
    ) as llm:
        outputs = llm.generate(PROMPTS * 2, [GREEDY] * 2 + [SEEDED] * 2)
        assert not any(llm.engine.chain.faults.values())
        return [output.outputs[0].token_ids for output in outputs], llm.engine.stats.num_accepted_draft_tokens


@functools.cache
def undisturbed(folder: Path, kind: str) -> tuple[list[list[int]], int]:
    """The same without observers."""
    return run(folder, kind)


CASES = [(hook, act) for hook in HOOKS for act in FAULTS if (hook, act) != ("warmup", returns_nothing)]  # as it should


@pytest.mark.parametrize(
    ("hook", "act"),
    slow_except(CASES, "propose", *((hook, act) for hook in HOOKS for act in (raises_after, returns_a_lie))),
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_an_observer_that_faults_costs_itself_alone(
    folder: Path, hook: str, act: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    expected = undisturbed(folder, "model")
    caplog.clear()
    assert run(folder, "model", spy=observer(hook, act)) == expected
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    text = warning.getMessage()
    assert text.startswith(f"observer 'provided spy' {FAULTS[act]}")
    assert f"in its wrapper of {hook}; it is switched off" in text


@pytest.mark.parametrize("act", [*FAULTS, alters_in_place], ids=lambda act: act.__name__)
def test_plain_decoding_does_not_mind_either(folder: Path, act: Callable[[], Any]) -> None:
    assert run(folder, "plain", spy=observer("verify", act)) == undisturbed(folder, "plain")


def test_a_strict_engine_says_which_observer_it_was(folder: Path) -> None:
    with pytest.raises(
        PluginError, match="observer 'provided spy' raised RuntimeError: after in its wrapper of propose"
    ):
        run(folder, "tokens", strict=True, spy=observer("propose", raises_after))


def test_other_observers_go_on(folder: Path) -> None:
    seen = []

    def looks() -> Any:
        result = yield
        seen.append(type(result).__name__)
        return result

    good, bad, other = (observer("verify", act) for act in (looks, raises_after, looks))
    assert run(folder, "plain", first=good, bad=bad, last=other) == undisturbed(folder, "plain")
    assert set(seen) == {"Verdict"}
    assert len(seen) % 2 == 0


def test_an_observer_sees_what_its_plugin_raises_and_cannot_hide_it(folder: Path) -> None:
    seen = []

    def hides() -> Any:
        try:
            yield
        except ZeroDivisionError as error:
            seen.append(str(error))

    plugins = {"broken": lambda c, t: 1 // 0, "spy": observer("load_speculator", hides)}
    with pytest.raises(PluginError, match="'broken' failed in load_speculator: ZeroDivisionError"):
        LLM(folder, skip_tokenizer_init=True, plugins=plugins, speculative_config={"method": "broken"})
    assert len(seen) == 1


@pytest.mark.parametrize("hook", ["load_speculator", "plan_memory", "warmup", "propose"])
def test_a_speculator_cannot_end_the_process(folder: Path, hook: str) -> None:
    def leaving(*_: Any) -> Any:
        raise SystemExit(3)

    class Leaving(TokenSpeculator):
        pass

    def make(config: Any, target: Any) -> Any:
        if hook == "load_speculator":
            leaving()
        speculator = Leaving(Oracle([], VOCABULARY))
        setattr(Leaving, hook, hookimpl(leaving_hook(hook)))
        return speculator

    def leaving_hook(name: str) -> Any:
        if name == "plan_memory":
            return lambda self, budget: leaving()
        if name == "warmup":
            return lambda self, resources: leaving()
        return lambda self, batch: leaving()

    plugins = {"leaver": make}
    options: Any = {"skip_tokenizer_init": True, "memory": "64MiB", "plugins": plugins}
    speculative = {"method": "leaver", "num_speculative_tokens": 3}
    if hook != "propose":
        with pytest.raises(SpecplugError, match=f"'leaver' tried to end the process in {hook}"):
            LLM(folder, speculative_config=speculative, **options)
        return
    with LLM(folder, speculative_config=speculative, **options) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
        assert llm.engine.chain.faults == {"leaver": 3}
    assert tokens == run(folder, "plain")[0][:2]


def test_a_module_that_implements_an_objects_hook_is_refused(folder: Path) -> None:
    class Hijacker:
        @hookimpl
        def verify(self, batch: Any) -> Any:
            return Verdict([[]] * len(batch.rows), [7] * len(batch.rows))

    with pytest.raises(PluginError, match="implements 'verify' in its module; make it a method of the object"):
        run(folder, "plain", hijacker=Hijacker())


def test_a_provided_plugin_leaves_the_others_alone(folder: Path) -> None:
    """One that takes an installed one's name does not let that answer for other methods."""
    plugins = {"eagle": lambda c, t: TokenSpeculator(Oracle([], VOCABULARY))}
    with LLM(
        folder,
        skip_tokenizer_init=True,
        plugins=plugins,
        speculative_config={"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1},
    ) as llm:
        assert type(llm.engine.chain.speculators[0].instance).__module__.startswith("specplug_ngram")


def test_a_wrapper_that_is_a_method_of_the_speculator_changes_no_verdict_and_marks_nothing(folder: Path) -> None:
    class Meddler(TokenSpeculator):
        verdicts = 0

        @hookimpl(wrapper=True)
        def verify(self, batch: Any) -> Any:
            verdict = yield
            Meddler.verdicts += 1
            return Verdict([[]] * len(verdict.next_tokens), [7] * len(verdict.next_tokens))

    plain = run(folder, "plain")[0][:2]
    known = [prompt + tokens for prompt, tokens in zip(PROMPTS, plain, strict=False)]
    plugins = {"meddler": lambda config, target: Meddler(Oracle(known, VOCABULARY, hit_rate=1.0))}
    options: dict[str, Any] = {"speculative_config": {"method": "meddler", "num_speculative_tokens": 3}}
    with LLM(folder, skip_tokenizer_init=True, memory="64MiB", plugins=plugins, **options) as llm:
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS[:2], GREEDY)]
        assert llm.engine.stats.num_accepted_draft_tokens > 0
    assert [output.token_ids for output in outputs] == plain
    assert [output.unverified_methods for output in outputs] == [[], []]
    assert Meddler.verdicts == 1, "it is switched off at its first attempt"
