"""The most likely token and its probability, by the kernels and by PyTorch's operations."""

from __future__ import annotations

import pytest
import torch

from specplug import argmax_with_prob
from specplug.native import library
from specplug.sampling import argmax as module
from specplug.sampling import distributions
from specplug.sampling.distributions import argmax


@pytest.fixture(params=["kernels", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "PyTorch":
        for place in (module, distributions):
            monkeypatch.setattr(place, "is_fast", lambda logits: False)
    elif not library.load():
        pytest.skip("no kernels on this machine")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 7, 16, 33, 4096, 50_001])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_it_is_the_softmaxs(way: str, dtype: torch.dtype, vocabulary: int, rows: int) -> None:
    logits = (4 * torch.randn(rows, vocabulary + 3, generator=torch.Generator().manual_seed(rows))).to(dtype)
    logits = logits[:, :vocabulary]  # rows that do not lie close
    logits[-1, vocabulary // 2 :] = logits[-1].max()  # equals: the first counts
    ids, probs = argmax_with_prob(logits)
    exact = logits.double() if module.is_fast(logits) else logits.float()  # in which PyTorch is off by 8e-6 on AVX2
    expected = exact.softmax(dim=-1).float()
    assert (ids.dtype, probs.dtype) == (torch.int64, torch.float32)
    assert ids.tolist() == logits.float().argmax(dim=-1).tolist()
    torch.testing.assert_close(probs, expected.amax(dim=-1), rtol=1e-5, atol=1e-7)


def test_what_is_masked_counts_as_nothing(way: str) -> None:
    logits = torch.full((2, 40), float("-inf"))
    logits[0, 17], logits[1, [3, 21]] = -2.0, 5.0
    ids, probs = argmax_with_prob(logits)
    assert ids.tolist() == [17, 3]
    assert probs.tolist() == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("place", [0, 15, 16, 38, 39])
def test_nan_is_found(way: str, place: int) -> None:
    logits = torch.randn(3, 40)
    logits[1, place] = float("nan")
    _, probs = argmax_with_prob(logits)
    assert probs.isnan().tolist() == [False, True, False]
    assert argmax(logits)[1] == 1


def test_infinity_is_a_token_and_no_nan(way: str) -> None:
    logits = torch.randn(2, 40)
    logits[0, 23] = float("inf")
    assert argmax(logits) == ([23, int(logits[1].argmax())], None)
