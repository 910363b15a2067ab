"""The soak tells an error in a stream from a text that contains the word."""

from __future__ import annotations

import json
from typing import Any

import pytest
import soak

pytestmark = pytest.mark.unit
DONE = "data: [DONE]\n\n"


def stream(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(event, separators=(',', ':'))}\n\n" for event in events) + DONE


def test_a_text_may_be_the_word_error() -> None:
    event = {"choices": [{"text": "error", "logprobs": {"tokens": ["error"], "top_logprobs": [{'"error":': -1.0}]}}]}
    assert soak.events_of(stream(event, event)) == [event, event]


def test_an_error_object_is_found_wherever_it_is() -> None:
    fine = {"choices": [{"text": "a"}]}
    with pytest.raises(RuntimeError, match=r"an error in a stream: .*generation_failed"):
        soak.events_of(stream(fine, {"error": {"message": "x", "code": "generation_failed"}}))


@pytest.mark.parametrize("text", ["", "data: {}\n\n", f"data: {{}}\n\n{DONE}data", stream() + "data: {}\n\n"])
def test_a_stream_that_ends_early_or_goes_on_is_found(text: str) -> None:
    with pytest.raises(RuntimeError, match="a stream ends with"):
        soak.events_of(text)
