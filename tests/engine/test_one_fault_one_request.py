"""What goes wrong for one request ends that request, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from specplug import LLM, GenerationError, SamplingParams
from specplug.testing.models import save_words
from specplug.text.token_decoder import TokenDecoder
from support.engines import assert_idle
from support.models import VOCABULARY, save_model
from support.speculators import ModelSpeculator, Oracle, TokenSpeculator, TreeSpeculator, provide

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 10, 11, 12]]
MIXED = [GREEDY, SamplingParams(max_tokens=8, n=2, seed=1), GREEDY, attrs.evolve(GREEDY, repetition_penalty=1.5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(save_model(tmp_path_factory.mktemp("model"), "llama"), VOCABULARY)


def start(folder: Path, kind: str = "plain", **more: Any) -> LLM:
    oracle = Oracle([], VOCABULARY, 0.8)
    options: dict[str, Any] = {
        "plain": {},
        "chain": provide(lambda c, t: TokenSpeculator(oracle)),
        "tree": provide(lambda c, t: TreeSpeculator(oracle, (1,), 6)),
        "model": provide(lambda c, t: ModelSpeculator(t, folder, c.num_speculative_tokens)),
    }[kind]
    return LLM(folder, memory="32MiB", strict=True, check_parity=False, compile=False, **options, **more)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[LLM]:
    with start(folder) as llm:
        yield llm


def ids(outputs: Any) -> list[list[list[int]]]:
    return [[each.token_ids for each in output.outputs] for output in outputs]


def is_victim(request: Any, victim: int, after: int = 2) -> bool:
    return request.tokens[: request.num_prompt_tokens] == PROMPTS[victim] and request.num_output_tokens >= after


def spoil_logits(llm: LLM, victim: int, patch: pytest.MonkeyPatch) -> None:
    verify = llm.engine._verification.verify

    def spoil(requests: Any, offsets: Any, logits: torch.Tensor) -> Any:
        logits = logits.clone()
        for row, request in enumerate(requests):
            if is_victim(request, victim):
                logits[offsets[row], 13] = float("nan")
        return verify(requests, offsets, logits)

    patch.setattr(llm.engine._verification, "verify", spoil)


@pytest.mark.parametrize("kind", ["plain", "chain", "tree", "model"])
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_nan_logits_end_their_request_alone(
    folder: Path, kind: str, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(folder, kind) as llm:
        expected = ids(llm.generate(PROMPTS, MIXED))
        with monkeypatch.context() as patch:
            spoil_logits(llm, victim, patch)
            with pytest.raises(GenerationError, match=rf"^prompt {victim}: the model returned NaN logits") as caught:
                llm.generate(PROMPTS, MIXED)
        assert_idle(llm)
        assert "\n" not in str(caught.value)
        for index, (output, own) in enumerate(zip(caught.value.outputs, expected, strict=True)):
            for completion, tokens in zip(output.outputs, own, strict=True):
                if index == victim:
                    assert completion.finish_reason == "error"
                    assert completion.error is not None
                    assert "NaN logits" in completion.error
                    assert 2 <= len(completion.token_ids) < len(tokens)
                    assert completion.token_ids == tokens[: len(completion.token_ids)]
                else:
                    assert (completion.finish_reason, completion.error) == ("length", None)
                    assert completion.token_ids == tokens
        assert ids(llm.generate(PROMPTS, MIXED)) == expected


def test_a_stream_reports_the_failed_one_and_yields_the_others(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ids(plain.generate(PROMPTS, GREEDY))
    with monkeypatch.context() as patch:
        spoil_logits(plain, 2, patch)
        pieces: list[Any] = []
        with pytest.raises(GenerationError, match=r"^prompt 2: "):
            pieces.extend(plain.stream(PROMPTS, GREEDY))
    ends = {piece.request_id: (piece.finish_reason, piece.error) for piece in pieces if piece.finish_reason}
    reasons = [ends[name] for name in sorted(ends, key=int)]
    assert [reason for reason, _ in reasons] == ["length", "length", "error", "length"]
    assert [error is not None for _, error in reasons] == [False, False, True, False]
    found = [[t for p in pieces if p.request_id == name for t in p.token_ids] for name in sorted(ends, key=int)]
    assert [found[i] for i in (0, 1, 3)] == [expected[i][0] for i in (0, 1, 3)]
    assert_idle(plain)


def test_the_step_engine_goes_on(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = plain.engine
    spoil_logits(plain, 0, monkeypatch)
    [bad] = engine.add_request("bad", PROMPTS[0], GREEDY)
    [good] = engine.add_request("good", PROMPTS[2], GREEDY)
    told = [output.request.id for _ in range(20) for output in engine.step() if output.request.is_finished]
    assert told == ["bad", "good"]
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert_idle(plain)


def broken_rule(llm: LLM, victim: int, patch: pytest.MonkeyPatch) -> None:
    from specplug.sampling.rules import LogitsRules

    apply = LogitsRules.apply

    def fail(self: Any, logits: Any, tokens: Any, num_prompt_tokens: int, paths: Any) -> Any:
        if list(tokens[:num_prompt_tokens]) == PROMPTS[victim]:
            raise OverflowError("too large for a float")
        return apply(self, logits, tokens, num_prompt_tokens, paths)

    patch.setattr(LogitsRules, "apply", fail)


def broken_text(llm: LLM, victim: int, patch: pytest.MonkeyPatch) -> None:
    from specplug.text.stream import TextStream

    push = TextStream.push

    def fail(self: Any, token: int, **options: Any) -> bool:
        if any(request.text is self and is_victim(request, victim, 3) for request in llm.engine.scheduler.running):
            raise KeyError(token)
        return push(self, token, **options)

    patch.setattr(TextStream, "push", fail)


def broken_scores(llm: LLM, victim: int, patch: pytest.MonkeyPatch) -> None:
    from specplug.engine import commit

    gather = commit.gather_logprobs

    def fail(logits: Any, tokens: Any, count: int) -> Any:
        if count == 7:
            raise MemoryError
        return gather(logits, tokens, count)

    patch.setattr(commit, "gather_logprobs", fail)


@pytest.mark.parametrize(
    ("break_it", "changes", "message"),
    [
        (broken_rule, {"presence_penalty": 0.5}, "OverflowError: too large"),
        (broken_text, {}, "KeyError"),
        (broken_scores, {"logprobs": 7}, "MemoryError"),
        (broken_scores, {"prompt_logprobs": 7}, "MemoryError"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_a_rule_a_text_or_scores_that_fail(
    plain: LLM,
    break_it: Callable[[LLM, int, pytest.MonkeyPatch], None],
    changes: dict[str, Any],
    message: str,
    streams: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victim = 3
    params = [attrs.evolve(GREEDY, n=2, seed=1, **(changes if index == victim else {})) for index in range(4)]
    expected = ids(plain.generate(PROMPTS, params))
    with monkeypatch.context() as patch:
        break_it(plain, victim, patch)
        with pytest.raises(GenerationError, match=rf"^prompt 3: {message}") as caught:
            list(plain.stream(PROMPTS, params)) if streams else plain.generate(PROMPTS, params)
    assert_idle(plain)
    outputs = caught.value.outputs
    assert ids(outputs)[:victim] == expected[:victim]
    assert outputs[victim].outputs[0].finish_reason == "error"
    assert ids(plain.generate(PROMPTS, params)) == expected


@pytest.mark.parametrize("scored", ["logprobs", "prompt_logprobs"])
def test_a_tokenizer_that_fails_on_the_text_of_scores(plain: LLM, monkeypatch: pytest.MonkeyPatch, scored: str) -> None:
    params = [attrs.evolve(GREEDY, **{scored: 2}), GREEDY]
    monkeypatch.setattr(TokenDecoder, "token", lambda *_: {}["unknown"])
    with pytest.raises(GenerationError, match=r"^prompt 0: KeyError: 'unknown'$") as caught:
        plain.generate(PROMPTS[:2], params)
    assert [output.outputs[0].finish_reason for output in caught.value.outputs] == ["error", "length"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_in_the_cache_of_a_failed_request_reaches_nobody(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 rows are padded and masked, and a NaN that is masked stays one."""
    with start(folder, dtype=dtype) as llm:
        expected = ids(llm.generate(PROMPTS, GREEDY))
        commit = llm.engine._committer.commit

        def poison(target: Any, verdict: Any) -> None:
            for row in target.rows:
                table = row.request.table
                if row.request.error is not None:
                    for tensor in (*llm.engine.runner.cache.keys, *llm.engine.runner.cache.values):
                        tensor[:, list(table.slots(0, table.capacity))] = float("nan")
            commit(target, verdict)

        with monkeypatch.context() as patch:
            spoil_logits(llm, 0, patch)
            patch.setattr(llm.engine._committer, "commit", poison)
            with pytest.raises(GenerationError, match=r"^prompt 0: [^;]*NaN"):
                llm.generate(PROMPTS, GREEDY)
        assert not any(tensor.isnan().any() for tensor in llm.engine.runner.cache_tensors)
        assert ids(llm.generate(PROMPTS, GREEDY)) == expected


def test_a_device_that_fails_ends_the_call_and_not_the_engine(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ids(plain.generate(PROMPTS, MIXED))
    forward = plain.engine.runner.forward
    with monkeypatch.context() as patch:
        patch.setattr(plain.engine.runner, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plain.generate(PROMPTS, MIXED)
    assert_idle(plain)
    calls = 0

    def flaky(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("once")
        return forward(*arguments, **options)

    monkeypatch.setattr(plain.engine.runner, "forward", flaky)
    families = [
        plain.engine.add_request(str(index), prompt, params)
        for index, (prompt, params) in enumerate(zip(PROMPTS, MIXED, strict=True))
    ]
    plain.engine.step()
    plain.engine.step()
    with pytest.raises(RuntimeError, match="once"):
        plain.engine.step()
    while plain.engine.has_unfinished_requests:
        plain.engine.step()
    assert [[request.output_ids for request in family] for family in families] == expected
