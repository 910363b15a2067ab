"""Verification on the device: what it leaves there is what the host would decide."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specplug.model.pending import PendingTokens, UpcomingTokens
from specplug.speculation.draft import Draft
from specplug.speculation.verification.ahead import match
from specplug.speculation.verification.matching import follow

VOCABULARY = 32


@pytest.mark.parametrize("seed", range(4))
def test_a_match_on_the_device_is_what_the_host_decides(seed: int) -> None:
    """Drafts of any length and none; NaN anywhere in a row is found."""
    chooser, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [chooser.randint(0, 4) for _ in range(9)]
    offsets = [0, *itertools.accumulate(1 + length for length in lengths)]
    logits = torch.randn(offsets[-1], VOCABULARY, generator=generator)
    right = logits.argmax(-1)
    logits[chooser.randrange(offsets[-1])] = float("nan")
    drafted = torch.zeros(len(lengths), 4, dtype=torch.int64)
    for row, (length, begin) in enumerate(zip(lengths, offsets, strict=False)):
        hits = [chooser.random() < 0.7 for _ in range(length)]
        drafted[row, :length] = torch.tensor(
            [int(right[begin + place]) if hit else 1 for place, hit in enumerate(hits)], dtype=torch.int64
        )
    pending = PendingTokens(64, VOCABULARY, torch.device("cpu"))
    rows = pending.put(drafted, lengths)
    requests: Any = [SimpleNamespace(draft=Draft("a", row) if len(row) else None) for row in rows]
    accepted = PendingTokens(64, VOCABULARY, torch.device("cpu"))
    found = accepted.put(match(requests, offsets, logits, pending), [2 + length for length in lengths])
    for row, request, begin, end in zip(found, requests, offsets, offsets[1:], strict=False):
        upcoming = UpcomingTokens(row)
        tokens = upcoming.read()
        assert len(upcoming) == end - begin
        if logits[begin:end].isnan().any():
            assert upcoming.error is not None
            continue
        path, token = follow(request.draft.tokens if request.draft else [], None, right[begin:end].tolist())
        assert tokens == [*right[begin : begin + len(path)].tolist(), token]
        assert upcoming.error is None
