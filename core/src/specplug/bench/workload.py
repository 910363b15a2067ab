"""The workload of a measurement: prompts, and the number of tokens to generate."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import attrs

from specplug.errors import RequestError

_FUNCTION = """\
def summarize(orders, minimum):
    totals = {}
    for order in orders:
        if order.amount < minimum:
            continue
        totals[order.customer] = totals.get(order.customer, 0) + order.amount
    return sorted(totals.items(), key=lambda item: item[1], reverse=True)
"""
_METHOD = """\
def load_settings(self, path, encoding="utf-8"):
    settings = {}
    with open(path, encoding=encoding) as stream:
        for line in stream:
            name, _, value = line.partition("=")
            settings[name.strip()] = value.strip()
    self.settings.update(settings)
    return settings
"""
_QUEUE = """\
class BoundedQueue:
    def __init__(self, capacity):
        self.capacity = capacity
        self.items = []

    def push(self, item):
        if len(self.items) >= self.capacity:
            raise OverflowError("the queue is full")
        self.items.append(item)

    def pop(self):
"""
_PARSER = """\
import argparse
import json


def main():
    parser = argparse.ArgumentParser(description="Count the words of text files.")
    parser.add_argument("files", nargs="+", help="the files to read")
"""
_NOTES = """\
Notes: Mira Okafor, 34, moved from Lagos to Turin in 2019 and repairs church organs.
Tomas Lind, 51, lives in Malmo, teaches chemistry, and has kept bees since 2008.
Aiko Mori, 27, of Kobe, draws maps of sea ice for the harbour office.

The same people as JSON, one object with name, age, city and work for each:
[
"""
_ESSAY = """\
Bread rises because yeast eats sugar and gives off gas. How long that takes depends on warmth, on how much yeast there is,
and on how wet the dough is. A baker who wants a slow dough with more taste will therefore
"""

PROMPTS: tuple[str, ...] = (
    f"# Before:\n{_FUNCTION}\n# After renaming totals to sums:\n",
    _QUEUE,
    f"# Before:\n{_METHOD}\n# After renaming stream to lines:\n",
    _PARSER,
    _NOTES,
    _ESSAY,
)
"""The default prompts: copying with changes, code completion, extraction, prose."""


@attrs.frozen
class BenchPrompt:
    """One prompt.

    Attributes:
        where: its name in messages.
        ids: its token ids.
    """

    where: str
    ids: list[int]


@attrs.frozen
class Workload:
    """What every contestant generates.

    Attributes:
        name: for reports.
        prompts: the prompts.
        max_tokens: tokens generated for each prompt; the end-of-sequence token is ignored.
    """

    name: str
    prompts: Sequence[BenchPrompt]
    max_tokens: int

    def requests(self, batch: int) -> list[BenchPrompt]:
        """Returns the prompts; repeated for a batch, so that there are at least two for each of its sequences."""
        count = max(len(self.prompts), 2 * batch if batch > 1 else 1)
        return list(itertools.islice(itertools.cycle(self.prompts), count))

    def repeats(self, batch: int) -> bool:
        """Returns whether prompts are repeated for a batch."""
        return len(self.requests(batch)) > len(self.prompts)

    def unrelated(self) -> Workload:
        """Returns random prompts of the same lengths, to warm up a method that learns."""
        chooser = random.Random(0)
        vocabulary = 1 + max((token for prompt in self.prompts for token in prompt.ids), default=0)
        prompts = [attrs.evolve(p, ids=[chooser.randrange(vocabulary) for _ in p.ids]) for p in self.prompts]
        return attrs.evolve(self, prompts=prompts)

    def num_tokens(self, batch: int) -> int:
        """Returns the number of tokens that a run generates."""
        return len(self.requests(batch)) * self.max_tokens

    def check_length(self, max_model_len: int) -> None:
        """Checks that every prompt and its output fit the model.

        Raises:
            RequestError: one does not; the message names it.
        """
        for prompt in self.prompts:
            if len(prompt.ids) + self.max_tokens > max_model_len:
                raise RequestError(
                    f"{prompt.where}: {len(prompt.ids):,} prompt tokens and {self.max_tokens:,} to generate are more than "
                    f"max_model_len={max_model_len:,}; lower --max-tokens, or shorten the prompt"
                )


@attrs.frozen
class Cell:
    """One setting under which all contestants are compared.

    Attributes:
        batch: concurrent sequences.
        temperature: 0 is greedy.
    """

    batch: int
    temperature: float

    def __str__(self) -> str:
        """The name in reports."""
        return f"batch {self.batch}, temperature {self.temperature:g}"
