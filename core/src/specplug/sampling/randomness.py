"""Separate random streams for drafting, target sampling, acceptance and residual sampling.

Unseeded rows draw from the engine's generators, one per stream. A seeded row draws noise keyed by (seed, output index,
stream), so that its output depends only on the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import attrs
import torch

_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """The use of a random number."""

    DRAFT = 1
    TARGET = 2
    ACCEPTANCE = 3
    RESIDUAL = 4


def mix(*keys: int) -> int:
    """Hashes integers to 63 well-mixed bits (splitmix64's finaliser, Steele et al. 2014, over each key in turn)."""
    state = 0x9E3779B97F4A7C15
    for key in keys:
        state = (state ^ (key & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


class EngineRandomness:
    """The generators of one engine, one per stream."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device
        self._generators = {
            stream: torch.Generator(device=device).manual_seed(mix(seed, int(stream))) for stream in Stream
        }
        self._keyed = torch.Generator(device=device)

    def generator(self, stream: Stream) -> torch.Generator:
        """The shared generator of a stream."""
        return self._generators[stream]

    def keyed(self, *keys: int) -> torch.Generator:
        """A generator seeded with the keys, valid until the next call."""
        return self._keyed.manual_seed(mix(*keys))


@attrs.define(eq=False)
class RowRandomness:
    """The random streams of one row.

    Attributes:
        engine: the engine's generators.
        number: the request's consecutive number in its engine.
        seed: the request's own seed; None draws from the engine's generators.
    """

    engine: EngineRandomness
    number: int
    seed: int | None
    _draft: torch.Generator | None = attrs.field(default=None, init=False)

    def draft_generator(self) -> torch.Generator:
        """The row's generator for drafting; it is independent of what verification draws."""
        if self._draft is None:
            key = mix(self.engine.seed, self.number, int(Stream.DRAFT))
            self._draft = torch.Generator(device=self.engine.device).manual_seed(key)
        return self._draft


def exponential_noise(
    rows: list[tuple[RowRandomness, int]], width: int, engine: EngineRandomness, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Draws the noise of an exponential race: the token with the smallest noise / probability is a sample.

    Args:
        rows: for each entry its row and output index. Entries of a seeded row with the same output index get the same
            noise: at most one of them is on the emitted path.
        width: the vocabulary size.
        engine: the engine's generators.
        out: where to write, float32 [len(rows), width].

    Returns:
        float32 [len(rows), width], standard exponential.
    """
    noise = torch.empty(len(rows), width, device=engine.device, dtype=torch.float32) if out is None else out
    if any(row.seed is None for row, _ in rows):
        noise.exponential_(generator=engine.generator(Stream.TARGET))
    drawn: dict[tuple[int, int], int] = {}
    for entry, (row, output_index) in enumerate(rows):
        if row.seed is None:
            continue
        key = (row.seed, output_index)
        if key in drawn:
            noise[entry] = noise[drawn[key]]
        else:
            noise[entry].exponential_(generator=engine.keyed(row.seed, output_index, int(Stream.TARGET)))
            drawn[key] = entry
    return noise


def race(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Samples one token per distribution: int64 [N] from float32 [N, V] and exponential noise [N, V].

    A token of probability zero is never sampled, since its arrival time is infinite. The noise is overwritten.
    """
    return noise.div_(probs).nan_to_num_(nan=float("inf")).argmin(dim=-1)


def sample(probs: torch.Tensor, generators: Sequence[torch.Generator], count: int = 1) -> torch.Tensor:
    """Draws tokens without replacement, in the order that lossless verification of sampled siblings needs.

    An exponential race: the tokens with the smallest noise / probability, in order of arrival, are draws without replacement
    (Kool et al. 1903.06059, in its Gumbel form). Use `row.generator`, never a stream of verification.

    Args:
        probs: float32 [N, V], the distributions. Report exactly these in `DraftDistributions`.
        generators: N random streams, one for each distribution; a stream may occur more than once.
        count: the number of tokens to draw from each distribution.

    Returns:
        int64 [N, count]. If fewer than `count` tokens have a probability above zero, the rest is -1.
    """
    noise = torch.empty_like(probs)
    for row, generator in enumerate(generators):
        if generator.device == noise.device:
            noise[row].exponential_(generator=generator)
        else:
            noise[row] = torch.empty(noise.shape[-1], device=generator.device, dtype=noise.dtype).exponential_(
                generator=generator
            )
    arrivals = noise.div_(probs).nan_to_num_(nan=float("inf"), posinf=float("inf"))
    if count == 1:
        return arrivals.argmin(dim=-1, keepdim=True)
    first = arrivals.topk(count, dim=-1, largest=False, sorted=True)
    return first.indices.masked_fill_(first.values.isinf(), -1)
