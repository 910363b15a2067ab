"""Parameters of which `make test` runs a few and `make test-all` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """The values, all but the kept ones marked `slow`; a tuple is kept by its first element or as a whole."""
    values = list(values)
    heads = [value[0] if isinstance(value, tuple) else value for value in values]
    missing = [each for each in kept if each not in values and each not in heads]
    assert not missing, f"no such parameter: {missing}"
    return [
        value
        if value in kept or head in kept
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value, head in zip(values, heads, strict=True)
    ]
