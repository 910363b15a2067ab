"""The trainer's arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import attrs

from specplug_eagle.train.options import HeadOptions, RunOptions


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser; its destinations are the fields of `HeadOptions` and `RunOptions`."""
    parser = argparse.ArgumentParser(
        prog="python -m specplug_eagle.train",
        description="Trains an EAGLE-3 head for a target, with training-time test. Writes the speculators format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", required=True, help="folder or hub name of a causal LM, or tiny")
    parser.add_argument(
        "--data", type=Path, required=True, help="JSON lines: text, messages, prompt+completion, input_ids"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the head, the record and the state to resume"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run, if there is one")
    _data(parser.add_argument_group("data"))
    _head(parser.add_argument_group("head"))
    _run(parser.add_argument_group("run"))
    return parser


def _data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--held-out", type=Path, help="JSON lines to measure on; a part of --data if not given")
    group.add_argument("--held-out-part", type=_part, default=0.02, help="how much of --data that is")
    group.add_argument("--max-length", type=_at_least(3), default=2048, help="tokens of a text; longer ones are cut")
    group.add_argument("--cache", type=Path, help="folder for the target's states, computed once")
    group.add_argument("--regenerate", action="store_true", help="let the target write the texts, from their prompts")
    group.add_argument("--regenerate-tokens", type=_at_least(1), default=1024, help="the most new tokens of a text")
    group.add_argument("--regenerate-batch", type=_at_least(1), default=16, help="texts written at once")
    group.add_argument("--regenerate-prompt-tokens", type=_at_least(1), default=64, help="where a text has no prompt")
    group.add_argument("--temperature", type=_not_negative, default=0.0, help="the target writes with it; 0 is greedy")


def _head(group: argparse._ArgumentGroup) -> None:
    default = HeadOptions()
    for name in ("hidden-size", "intermediate-size", "num-heads", "num-kv-heads", "head-dim"):
        group.add_argument(f"--{name}", type=_at_least(1), help="the target's if not given")
    group.add_argument("--num-layers", type=_at_least(1), default=default.num_layers, help="draft layers")
    group.add_argument("--layer-ids", type=_ids, help="target states to read, b enters layer b: 2,L/2,L-3 if not given")
    group.add_argument("--draft-vocab-size", type=_at_least(1), help="the most frequent tokens; all if not given")
    group.add_argument("--lm-head", choices=("train", "freeze", "borrow"), default=default.lm_head)
    for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        option = f"--{flag.replace('_', '-')}"
        group.add_argument(option, action=argparse.BooleanOptionalAction, default=getattr(default, flag))
    group.add_argument("--rope-theta", type=_positive, help="the target's if not given")


def _run(group: argparse._ArgumentGroup) -> None:
    default = attrs.asdict(RunOptions())
    group.add_argument("--steps", type=_at_least(1), default=default["steps"], help="draft steps of the unroll")
    group.add_argument(
        "--step-decay", type=_positive, default=default["step_decay"], help="weight of a step to the next"
    )
    group.add_argument("--epochs", type=_at_least(1), default=default["epochs"])
    group.add_argument("--max-steps", type=_at_least(1), help="end after so many optimiser steps")
    group.add_argument("--max-minutes", type=_positive, help="shorten the schedule to end after so long")
    group.add_argument("--learning-rate", type=_positive, default=default["learning_rate"])
    group.add_argument("--warmup", type=_part, default=default["warmup"], help="part of all steps")
    group.add_argument("--weight-decay", type=_not_negative, default=default["weight_decay"])
    group.add_argument("--clip", type=_positive, default=default["clip"], help="norm of the gradient")
    group.add_argument("--batch-tokens", type=_at_least(3), default=default["batch_tokens"], help="of a micro-batch")
    group.add_argument("--accumulate", type=_at_least(1), default=default["accumulate"], help="micro-batches of a step")
    group.add_argument("--gamma", type=_at_least(1), help="drafts of the held-out measurement; --steps if not given")
    group.add_argument("--seed", type=int, default=default["seed"])
    group.add_argument("--save-every", type=_at_least(1), default=500, help="optimiser steps between saved states")
    group.add_argument("--device", help="a GPU if there is one")
    group.add_argument("--dtype", choices=_DTYPES, help="of the target; its own on a GPU, float32 on a CPU")
    group.add_argument("--save-dtype", choices=_DTYPES, help="of the written head; bfloat16 if not given")


_DTYPES = ("float32", "bfloat16", "float16")


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return integer


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def _part(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _ids(text: str) -> tuple[int, ...]:
    ids = tuple(int(part) for part in text.split(","))
    if len(set(ids)) < len(ids) or min(ids) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a list of different layer numbers")
    return ids
