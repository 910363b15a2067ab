"""Log-probabilities in OpenAI's two shapes, and in vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specplug.sampling.logprobs import Logprob, PositionLogprobs

_LEAST = -9999.0  # JSON has no infinity; vLLM writes this too


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _LEAST)


def _text(token: int, entry: Logprob) -> str:
    return f"token_id:{token}" if entry.decoded_token is None else entry.decoded_token


def chat_logprobs(tokens: Sequence[int], positions: Sequence[PositionLogprobs], count: int) -> dict[str, Any]:
    """The `logprobs` of a chat choice.

    Args:
        tokens: the chosen ids.
        positions: for each of them the scored ones.
        count: how many most likely ones were asked for.
    """
    return {
        "content": [
            {
                **_entry(token, position[token]),
                "top_logprobs": [_entry(each, entry) for each, entry in position.items() if (entry.rank or 0) <= count],
            }
            for token, position in zip(tokens, positions, strict=False)
        ]
    }


def _entry(token: int, entry: Logprob) -> dict[str, Any]:
    text = _text(token, entry)
    return {"token": text, "logprob": _value(entry), "bytes": list(text.encode("utf-8", "replace"))}


def completion_logprobs(
    tokens: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    texts: Sequence[str] | None,
    offset: int = 0,
) -> dict[str, Any]:
    """The `logprobs` of a completion choice.

    Args:
        tokens: the ids.
        positions: for each of them the scored ones; None for the first token of a prompt.
        texts: for each id the text that it completes; None: the tokens' own texts.
        offset: of the first of these texts in the text of the choice.
    """
    result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for index, (token, position) in enumerate(zip(tokens, positions, strict=False)):
        own = None if position is None else position.get(token)
        text = "" if own is None else _text(token, own)
        result["tokens"].append(text)
        result["token_logprobs"].append(None if own is None else _value(own))
        result["top_logprobs"].append(
            None if position is None else {_text(each, entry): _value(entry) for each, entry in position.items()}
        )
        result["text_offset"].append(offset)
        offset += len(texts[index]) if texts is not None and index < len(texts) else len(text)
    return result


def join_logprobs(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The `logprobs` of a prompt and of its completion as one."""
    return {name: first[name] + second[name] for name in first}


def prompt_logprobs(positions: Sequence[PositionLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """The `prompt_logprobs` of a choice, in vLLM's shape."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token): {"logprob": _value(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for token, entry in position.items()
        }
        for position in positions
    ]
