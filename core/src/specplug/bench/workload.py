"""What is generated while it is measured: prompts, and how many tokens of each."""

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
"""What is measured where the user gives no prompts: copying with changes, continuing code, extraction, prose."""


@attrs.frozen
class BenchPrompt:
    """One prompt.

    Attributes:
        where: what messages call it.
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
        max_tokens: how many tokens each is continued by; the end-of-sequence token does not end it.
    """

    name: str
    prompts: Sequence[BenchPrompt]
    max_tokens: int

    def requests(self, batch: int) -> list[BenchPrompt]:
        """The prompts, in a batch repeated until every place serves two: the last ones leave places empty."""
        count = max(len(self.prompts), 2 * batch if batch > 1 else 1)
        return list(itertools.islice(itertools.cycle(self.prompts), count))

    def repeats(self, batch: int) -> bool:
        """Whether some prompts are generated more often than they were given."""
        return len(self.requests(batch)) > len(self.prompts)

    def unrelated(self) -> Workload:
        """Random tokens in place of the prompts, of the same lengths: they warm up a method and teach it none of these."""
        chooser = random.Random(0)
        vocabulary = 1 + max((token for prompt in self.prompts for token in prompt.ids), default=0)
        prompts = [attrs.evolve(p, ids=[chooser.randrange(vocabulary) for _ in p.ids]) for p in self.prompts]
        return attrs.evolve(self, prompts=prompts)

    def num_tokens(self, batch: int) -> int:
        """How many tokens one run generates."""
        return len(self.requests(batch)) * self.max_tokens

    def check_length(self, max_model_len: int) -> None:
        """Refuses what the engine has no room for.

        Raises:
            RequestError: the message names the first such prompt.
        """
        for prompt in self.prompts:
            if len(prompt.ids) + self.max_tokens > max_model_len:
                raise RequestError(
                    f"{prompt.where}: {len(prompt.ids):,} tokens of prompt and {self.max_tokens:,} to generate are more than "
                    f"the {max_model_len:,} of a sequence; lower --max-tokens, or shorten the prompt"
                )


@attrs.frozen
class Cell:
    """One setting under which all contestants are compared.

    Attributes:
        batch: sequences that are generated at a time.
        temperature: 0 is greedy.
    """

    batch: int
    temperature: float

    def __str__(self) -> str:
        """How reports call it."""
        return f"batch {self.batch}, temperature {self.temperature:g}"
