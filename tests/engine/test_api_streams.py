"""Streams, aborts, and what is left when something goes wrong in the middle: nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from safetensors.torch import load_file, save_file

from specplug import LLM, SamplingParams, Verdict, hookimpl
from specplug.errors import GenerationError, RequestError
from support.engines import assert_idle
from support.follow import Follow
from support.marks import slow_except
from support.models import VOCABULARY
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator, TreeSpeculator, provide

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_stream_equals_generate(folder: Path) -> None:
    prompts: list[Any] = ["w3. w4.", [5], {"prompt": "w6."}, [9, 10, 11], "w3."]
    params = [
        attrs.evolve(GREEDY, n=1 + index % 2, max_tokens=3 + 4 * index, logprobs=index % 2, stop=["w7.", "w1"])
        for index in range(len(prompts))
    ]
    oracle = Oracle([], VOCABULARY, 0.8)
    with LLM(
        folder, memory="32MiB", max_num_seqs=3, strict=True, **provide(lambda c, t: TreeSpeculator(oracle, (1,), 6))
    ) as llm:
        expected = llm.generate(prompts, params)
        oracle.known += [each.prompt_token_ids + out.token_ids for each in expected for out in each.outputs]
        found: dict[tuple[int, int], list[Any]] = {}
        first = int(expected[-1].request_id) + 1
        for piece in llm.stream(prompts, params):
            assert len(piece.token_ids) == len(piece.sources) == len(piece.token_texts) > 0
            found.setdefault((int(piece.request_id) - first, piece.index), []).append(piece)
        assert llm.engine.stats.num_accepted_draft_tokens > 5
        assert_idle(llm)
    assert sorted(found) == [(i, j) for i, param in enumerate(params) for j in range(param.n)]
    for (request, index), pieces in found.items():
        output = expected[request].outputs[index]
        assert [token for piece in pieces for token in piece.token_ids] == output.token_ids
        assert "".join(piece.text for piece in pieces) == output.text
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [output.finish_reason]
        assert len({id(piece.metrics) for piece in pieces}) == 1
        assert pieces[0].metrics.num_steps == len(pieces)
        sources = [source for piece in pieces for source in piece.sources]
        assert sum(source is not None for source in sources) == pieces[0].metrics.num_accepted_draft_tokens


def test_leaving_a_stream_aborts_the_rest(words: LLM) -> None:
    before = words.generate([5], GREEDY)[0].outputs[0].token_ids
    for _ in words.stream([[3, 4], [5]], attrs.evolve(GREEDY, n=2, max_tokens=90)):
        break
    assert_idle(words)
    stream = words.stream([[3, 4], [5]], attrs.evolve(GREEDY, max_tokens=90))
    next(stream)
    assert words.engine.has_unfinished_requests
    stream.close()  # type: ignore[attr-defined]
    assert_idle(words)

    def fail() -> None:
        for _ in words.stream([3, 4], GREEDY):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_idle(words)
    assert words.generate([5], GREEDY)[0].outputs[0].token_ids == before


def test_two_streams_at_once(words: LLM) -> None:
    """Each gets all of its tokens, whoever runs the step that commits them."""
    params = attrs.evolve(GREEDY, max_tokens=12)
    expected = [words.generate([prompt], params)[0].outputs[0].token_ids for prompt in ([3, 4], [5])]
    streams = [words.stream([prompt], params) for prompt in ([3, 4], [5])]
    found: list[list[int]] = [[], []]
    for pieces in itertools.zip_longest(*streams):
        for tokens, piece in zip(found, pieces, strict=True):
            tokens += [] if piece is None else piece.token_ids
    assert found == expected
    stream = words.stream([[3, 4]], params)
    tokens = list(next(stream).token_ids)
    assert words.generate([[5]], params)[0].outputs[0].token_ids == expected[1]
    assert tokens + [token for piece in stream for token in piece.token_ids] == expected[0]


def test_abort(words: LLM) -> None:
    pieces: dict[str, list[int]] = {}
    aborted: list[bool] = []
    for piece in words.stream([[3, 4], [5]], attrs.evolve(GREEDY, max_tokens=30, n=2)):
        pieces.setdefault(piece.request_id, []).extend(piece.token_ids)
        if not aborted and len(pieces) == 2:
            victim, other = sorted(pieces, key=int)
            aborted += [words.abort(victim), words.abort(victim), words.abort("nobody")]
    assert aborted == [True, False, False]
    assert len(pieces[other]) == 60
    assert len(pieces[victim]) < 60
    assert_idle(words)


def test_a_closed_engine(folder: Path) -> None:
    llm = LLM(folder, memory="32MiB", check_parity=False)
    stream = llm.stream([3, 4], GREEDY)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(RequestError, match="closed"):
        llm.generate([3, 4], GREEDY)
    assert list(stream) == []


# ---- faults in the middle -----------------------------------------------------------------------------------------

PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 10, 11, 12]]
MIXED = [GREEDY, SamplingParams(max_tokens=8, n=2, seed=1), GREEDY, attrs.evolve(GREEDY, repetition_penalty=1.5)]


def options(kind: str, folder: Path) -> dict[str, Any]:
    oracle = Oracle([], VOCABULARY, 0.8)
    return {
        "plain": {},
        "chain": provide(lambda c, t: TokenSpeculator(oracle)),
        "tree": provide(lambda c, t: TreeSpeculator(oracle, (1,), 6)),
        "model": provide(lambda c, t: ModelSpeculator(t, folder, c.num_speculative_tokens)),
    }[kind]


def ids(llm: LLM) -> list[list[list[int]]]:
    return [[each.token_ids for each in output.outputs] for output in llm.generate(PROMPTS, MIXED)]


class Failing:
    """Does what another callable does, until its third call."""

    def __init__(self, call: Callable[..., Any], error: BaseException) -> None:
        self.call = call
        self.error = error
        self.calls = 0

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return self.call(*args, **keywords)


@pytest.mark.parametrize("place", ["step", "schedule", "forward", "verify", "propose", "after propose"])
@pytest.mark.parametrize("kind", slow_except(["plain", "chain", "tree", "model"], "tree", "model"))
def test_an_interrupt_leaves_nothing_running(
    folder: Path, kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(folder, memory="32MiB", strict=True, check_parity=False, **options(kind, folder)) as llm:
        expected = ids(llm)
        owner, name = {
            "step": (llm.engine, "step"),
            "schedule": (llm.engine.scheduler, "schedule"),
            "forward": (llm.engine.runner, "forward"),
            "verify": (llm.engine._verification, "verify"),
            "propose": (llm.engine.chain, "propose"),
            "after propose": (llm.engine.chain, "_keep_unseen_states"),
        }[place]
        for run in (ids, lambda llm: list(llm.stream(PROMPTS, MIXED))):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, Failing(getattr(owner, name), KeyboardInterrupt()))
                with pytest.raises(KeyboardInterrupt):
                    run(llm)
            assert_idle(llm)
            assert not llm.engine.scheduler.running
            assert ids(llm) == expected
            assert_idle(llm)


def test_an_interrupt_as_a_request_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the commit of its last token and its removal."""
    with LLM(folder, memory="32MiB", check_parity=False) as llm:
        monkeypatch.setattr(llm.engine._states, "record", Failing(llm.engine._states.record, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, attrs.evolve(GREEDY, max_tokens=3))
        assert_idle(llm)


def test_a_model_with_nan_weights(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with LLM(tmp_path, memory="32MiB", check_parity=False) as llm:
        for params in (
            GREEDY,
            SamplingParams(),
            SamplingParams(top_k=3, min_p=0.1, top_p=0.5),
            SamplingParams(temperature=0, presence_penalty=1.0, logit_bias={3: 1.0}),
        ):
            with pytest.raises(
                GenerationError,
                match=r"^prompt 0: the model returned NaN logits for request '\d+' after 2 tokens; .*dtype",
            ):
                llm.generate([3, 4], params)
            assert_idle(llm)
        allowed = SamplingParams(temperature=0, allowed_token_ids=[5, 6], max_tokens=3)
        assert len(llm.generate([3, 4], allowed)[0].outputs[0].token_ids) == 3  # the NaN is nowhere in sight


def test_nan_logits_are_not_blamed_on_a_plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Verifying(Follow):
        @hookimpl
        def verify(self, batch: Any, target: Any) -> Verdict:
            tokens = target.argmax([target.offsets[row] for row in range(len(batch.rows))])
            return Verdict([[] for _ in tokens], tokens)

    follow = Verifying([])
    with LLM(folder, memory="32MiB", strict=True, check_parity=False, **provide(lambda c, t: follow)) as llm:
        follow.known = [[3, 4, *llm.generate([3, 4], GREEDY)[0].outputs[0].token_ids]]
        forward, calls = llm.engine.runner.forward, itertools.count()
        monkeypatch.setattr(
            llm.engine.runner,
            "forward",
            lambda *args, **options: forward(*args, **options) + (float("nan") if next(calls) else 0),
        )
        with pytest.raises(GenerationError, match="NaN"):
            llm.generate([3, 4], GREEDY)
        assert next(calls) == 2
        assert_idle(llm)
