"""Chains that stop where their speculator is unsure: by its own probabilities, at the chances that core names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import specplug_draft_model
from specplug import LLM, Budget, SamplingParams, resolve_model
from specplug.request import Request
from specplug.speculation.draft import Draft
from specplug.speculation.draft_length import FixedDraftLength

DEPTH = 6
PROMPTS = [
    "import os\nimport sys\n\n\nclass Point:\n    def __init__(self, x, y):\n",
    "def read_lines(path, encoding):\n    result = []\n    with open(path) as stream:\n        for line in",
    "    def test_one(self):\n        self.assertEqual(f(1), 1)\n        self.assertEqual(f(2), 2)\n        self",
]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
METHODS = ["draft_model", "eagle3"]


class Hinted(FixedDraftLength):
    """Names the same chances at every step."""

    def __init__(self, min_probability: float, min_surplus: float) -> None:
        self.budget = Budget(DEPTH, DEPTH, min_probability, min_surplus)

    def length_of(self, request: Request, speculator: Any) -> Any:
        return self.budget


def run(method: str, policy: FixedDraftLength, params: Any = GREEDY) -> tuple[list[list[int]], list[list[Draft]]]:
    """Outputs, and the drafts of every step in which all of them could be of full length."""
    config = {"method": method, "num_speculative_tokens": DEPTH}
    drafts: list[list[Draft]] = []
    with LLM("tiny", dtype="float32", device="cpu", strict=True, speculative_config=config) as llm:
        chain = llm.engine.chain
        chain.policy, propose = policy, chain.propose

        def watch(requests: list[Request], *args: Any) -> None:
            propose(requests, *args)
            step = [request.draft for request in requests if request.draft]
            if all(draft.allowed == DEPTH for draft in step):
                drafts.append(step)

        chain.propose = watch  # type: ignore[method-assign]
        outputs = llm.generate(PROMPTS, params)
    return [output.outputs[0].token_ids for output in outputs], drafts


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    with LLM("tiny", dtype="float32", device="cpu") as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_stops_behind_the_first_token_that_makes_it_too_unlikely(method: str, plain: list[list[int]]) -> None:
    outputs, steps = run(method, Hinted(0.5, 1e-9))
    lengths = set()
    for draft in (draft for drafts in steps for draft in drafts):
        assert draft.scores is not None
        chances = [math.exp(score) for score in draft.scores]
        assert all(chance * (1 + chance) / 2 >= 0.5 for chance in chances[:-1])
        assert len(chances) == DEPTH or chances[-1] * (1 + chances[-1]) / 2 < 0.5
        lengths.add(len(chances))
    assert outputs == plain
    assert {1, DEPTH} < lengths


@pytest.mark.parametrize("method", METHODS)
def test_all_rows_stop_where_together_they_are_not_worth_a_forward(method: str, plain: list[list[int]]) -> None:
    outputs, steps = run(method, Hinted(0.2, 1.0))
    stopped = 0
    for drafts in steps:
        for length in range(1, DEPTH):
            before = [d for d in drafts if len(d) >= length]
            chances = [math.exp(d.scores[length - 1]) for d in before if d.scores is not None]
            goes = Budget.worth_extending([Budget(DEPTH, DEPTH, 0.2, 1.0)] * len(before), chances)
            assert [len(d) > length for d in before] == goes
            stopped += sum(goes) == 0 and max(chances, default=0.0) >= 0.4
    assert outputs == plain
    assert stopped


@pytest.mark.parametrize("method", METHODS)
def test_without_a_hint_and_where_drafts_are_sampled_no_row_stops(method: str) -> None:
    sampled = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)
    for policy, params in ((FixedDraftLength(), GREEDY), (Hinted(0.5, 1e-9), sampled)):
        drafts = [draft for step in run(method, policy, params)[1] for draft in step]
        assert len(drafts) > 20
        assert all(len(draft) == DEPTH for draft in drafts)
        assert all((draft.probs is None) == (params is GREEDY) for draft in drafts)


@pytest.mark.parametrize("method", METHODS)
def test_sampled_rows_go_on_beside_greedy_ones_that_stop(method: str, plain: list[list[int]]) -> None:
    sampled = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)
    outputs, steps = run(method, Hinted(0.5, 0.3), [GREEDY, sampled, GREEDY])
    drafts = [draft for step in steps for draft in step]
    assert {len(draft) for draft in drafts if draft.probs is not None} == {DEPTH}
    assert len({len(draft) for draft in drafts if draft.probs is None}) > 2
    assert [outputs[0], outputs[2]] == [plain[0], plain[2]]


def test_a_draft_models_scores_are_its_log_probabilities() -> None:
    folder = Path(specplug_draft_model.__file__).parent / "tiny"
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model("tiny"))
    ids = tokenizer(PROMPTS[0])["input_ids"]
    config = {"method": "draft_model", "num_speculative_tokens": DEPTH}
    with LLM("tiny", dtype="float32", device="cpu", strict=True, speculative_config=config) as llm:
        llm.engine.chain.policy = Hinted(0.01, 1e-9)
        (request,) = llm.engine.add_request("only", ids, GREEDY)
        while request.draft is None:
            llm.engine.step()
        draft, before = request.draft, list(request.tokens)
    with torch.inference_mode():
        logits = reference(torch.tensor([[*before, *draft.tokens]])).logits[0]
    own = logits.log_softmax(dim=-1)[len(before) - 1 : -1].gather(1, torch.tensor(draft.tokens)[:, None])[:, 0]
    assert draft.scores == pytest.approx(own.cumsum(0).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("chances", "expected"),
    [
        ([0.9, 0.9], [True, True]),
        ([0.9, 0.1], [True, False]),  # 0.855 - 0.3 reaches 0.5
        ([0.7, 0.1], [False, False]),  # 0.595 - 0.3 does not
        ([0.7, 0.7], [True, True]),  # but two do
        ([0.7], [False]),
        ([0.9], [True]),
        ([0.1, 0.1], [False, False]),
        ([0.5, None], [True, True]),  # one goes on in any case
        ([0.1, None], [False, True]),
        ([], []),
    ],
)
def test_which_chains_are_worth_extending(chances: list[float | None], expected: list[bool]) -> None:
    assert Budget.worth_extending([Budget(4, 4, 0.3, 0.5)] * len(chances), chances) == expected
