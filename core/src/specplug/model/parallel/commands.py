"""What the first rank tells the others: orders over a pipe, in the order in which they must run."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug.model.architecture.architecture import Architecture

JOINED, READY = "joined", "ready"  # a rank's words to the first one


@attrs.frozen
class RankSettings:
    """What a rank is started with.

    Attributes:
        rank: its number; 0 is the engine's process.
        size: how many ranks there are.
        folder: the checkpoint.
        trust_remote_code: whether the checkpoint's own code may run.
        architecture: of this rank's part.
        dtype: of the weights.
        device: of this rank.
        num_blocks: KV blocks.
        block_size: tokens of a KV block.
        runs_ahead: whether forwards may name tokens that only the first rank's device knows.
        meeting: the file through which the process group is formed.
    """

    rank: int
    size: int
    folder: Path
    trust_remote_code: bool
    architecture: Architecture
    dtype: torch.dtype
    device: torch.device
    num_blocks: int
    block_size: int
    runs_ahead: bool
    meeting: Path = Path()


@attrs.frozen
class Order:
    """One call that a rank makes: a method's name and its arguments."""

    name: str
    arguments: tuple[Any, ...] = ()


def encode(message: Any) -> bytes:
    """A message as bytes. Both ends are processes of one engine, connected by a pipe that nobody else can write to."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def receive(connection: Connection) -> Any:
    """The next message.

    Raises:
        EOFError: the other process has ended.
    """
    return pickle.loads(connection.recv_bytes())
