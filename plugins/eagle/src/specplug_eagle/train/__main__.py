"""The command line of the trainer."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug import ConfigurationError, SpecplugError
from specplug_eagle.train.build import boundaries_of, head_spec, new_head, write_head
from specplug_eagle.train.data import Sample, choose_vocabulary, count_tokens, fingerprint, read_prompts, read_samples
from specplug_eagle.train.loop import RECORD, Trainer
from specplug_eagle.train.options import HeadOptions, RunOptions
from specplug_eagle.train.parser import make_parser
from specplug_eagle.train.progress import Reporter
from specplug_eagle.train.regenerate import Writing, regenerate
from specplug_eagle.train.state import NAME
from specplug_eagle.train.states import CachedStates, LiveStates, StateSource
from specplug_eagle.train.target import Target

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the trainer; returns the exit status."""
    args = make_parser().parse_args(arguments)
    try:
        with Reporter() as reporter, _fast_products():
            return train(args, reporter)
    except SpecplugError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@contextmanager
def _fast_products() -> Iterator[None]:
    """Uses TensorFloat-32 during training only; other code in the process stays exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def train(args: argparse.Namespace, reporter: Reporter) -> int:
    """Trains as asked for."""
    out = args.out
    if (out / NAME).is_file() and not args.resume:
        raise ConfigurationError(f"{out} holds an interrupted run; continue it with --resume, or give another --out")
    if args.resume and not (out / NAME).is_file() and (out / RECORD).is_file():
        reporter.line(f"the run in {out} is complete")
        return 0
    target = Target.load(args.target, dtype=args.dtype, device=args.device)
    head_options, run_options = _options(args, HeadOptions), _options(args, RunOptions)
    spec = head_spec(head_options, target)
    boundaries = boundaries_of(spec, target)
    training, held_out = _texts(args, target, reporter)
    members = _members(training, spec.draft_vocab_size, target, reporter)
    data = fingerprint([*training, *held_out])
    states: StateSource = LiveStates(target, boundaries)
    if args.cache is not None:
        states = CachedStates(
            args.cache,
            target,
            boundaries,
            [*training, *held_out],
            data,
            batch_tokens=run_options.batch_tokens,
            progress=lambda done, total: reporter.update("caching states", done, total),
        )
    head = new_head(spec, head_options, target, members, run_options.seed)
    trained = sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad)
    reporter.line(
        f"target states {', '.join(map(str, boundaries))} of {target.num_layers} layers; {trained:,} parameters; "
        f"{len(training):,} texts with {sum(map(len, training)):,} tokens, {len(held_out):,} held out"
    )
    dtype = torch.bfloat16 if args.save_dtype is None else getattr(torch, args.save_dtype)
    trainer = Trainer(
        head=head,
        target=target,
        states=states,
        train=training,
        held_out=held_out,
        options=run_options,
        folder=out,
        write=lambda: write_head(out, head, target, boundaries, dtype),
        run={
            "target": target.fingerprint(),
            "data": data,
            "head": _hash(attrs.asdict(spec), head_options.lm_head),
            "run": _hash(attrs.asdict(run_options)),
        },
        save_every=args.save_every,
        reporter=reporter,
    )
    if trainer.fit(args.resume):
        reporter.line(f"wrote {out}")
        return 0
    reporter.line(f"interrupted at step {trainer.position.step}; continue with --resume")
    return INTERRUPTED


def _texts(args: argparse.Namespace, target: Target, reporter: Reporter) -> tuple[list[Sample], list[Sample]]:
    data, held_out = args.data, args.held_out
    if args.regenerate:
        writing = Writing(args.regenerate_tokens, args.temperature, args.regenerate_batch, args.seed)
        data = _rewritten(data, args.out / "regenerated.jsonl", args, writing, target, reporter)
        if held_out is not None:
            file = args.out / "regenerated_held_out.jsonl"
            held_out = _rewritten(held_out, file, args, writing, target, reporter)
    training = read_samples(data, target.tokenizer, target.vocab_size, args.max_length)
    if held_out is not None:
        return training, read_samples(held_out, target.tokenizer, target.vocab_size, args.max_length)
    if len(training) < 2:
        raise ConfigurationError(f"{data} holds a single text; give more, or --held-out FILE")
    count = min(max(1, round(len(training) * args.held_out_part)), len(training) - 1)
    order = torch.randperm(
        len(training), generator=torch.Generator().manual_seed(args.seed), dtype=torch.int64, device="cpu"
    ).tolist()
    return [training[i] for i in sorted(order[count:])], [training[i] for i in sorted(order[:count])]


def _rewritten(
    source: Path, file: Path, args: argparse.Namespace, writing: Writing, target: Target, reporter: Reporter
) -> Path:
    prompts = read_prompts(source, target.tokenizer, args.regenerate_prompt_tokens)
    prompts = [prompt[-args.max_length :] for prompt in prompts]
    regenerate(target, prompts, file, writing, lambda done, total: reporter.update("the target writes", done, total))
    return file


def _members(training: Sequence[Sample], size: int, target: Target, reporter: Reporter) -> torch.Tensor | None:
    if size == target.vocab_size:
        return None
    counts = count_tokens(training, target.vocab_size)
    members = choose_vocabulary(counts, size)
    covered = counts[members].sum().item() / max(1, counts.sum().item())
    reporter.line(f"the draft vocabulary of {size:,} tokens covers {covered:.2%} of what is to be predicted")
    return members.to(target.device)


def _options(args: argparse.Namespace, kind: Any) -> Any:
    """Makes an attrs instance from the arguments that have its fields' names."""
    return kind(**{field.name: getattr(args, field.name) for field in attrs.fields(kind)})


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
