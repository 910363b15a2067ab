"""The run: epochs of optimiser steps, a held-out measurement after each, and a state to continue from."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

from specplug_eagle.head import DraftHead
from specplug_eagle.train.batches import Batch, collate, fill, plan_epoch
from specplug_eagle.train.data import Sample
from specplug_eagle.train.evaluate import autocast, evaluate
from specplug_eagle.train.loss import backward
from specplug_eagle.train.options import RunOptions
from specplug_eagle.train.progress import Reporter
from specplug_eagle.train.state import NAME, Position, load_state, save_state
from specplug_eagle.train.states import StateSource
from specplug_eagle.train.target import Target
from specplug_eagle.train.unroll import unroll

RECORD = "training.json"


@attrs.define
class Trainer:
    """Trains one head.

    Attributes:
        head: float32, on the target's device.
        target: lends embedding and output layer.
        states: the target's states of a batch.
        train: the texts to learn.
        held_out: the texts to measure on; their indices follow those of `train`.
        options: of the run.
        folder: for the state and the record.
        write: writes the head where users load it from.
        run: fingerprints that a continued run must share.
        save_every: optimiser steps between states.
        reporter: shows progress.
    """

    head: DraftHead
    target: Target
    states: StateSource
    train: Sequence[Sample]
    held_out: Sequence[Sample]
    options: RunOptions
    folder: Path
    write: Callable[[], None]
    run: Mapping[str, str]
    save_every: int
    reporter: Reporter
    interrupted: bool = False
    position: Position = attrs.field(factory=Position, init=False)
    history: list[dict[str, Any]] = attrs.field(factory=list, init=False)
    _loss: float | None = attrs.field(default=None, init=False)

    def fit(self, resume: bool) -> bool:
        """Trains to the end, or until interrupted.

        Args:
            resume: continue from the saved state if there is one.

        Returns:
            Whether the run is complete.

        Raises:
            ConfigurationError: the saved state belongs to another run.
        """
        optimizer = self._optimizer()
        saved = load_state(self.folder, self.run, self.head, optimizer) if resume else None
        if saved is not None:
            self.position, self.history = saved
            self.reporter.line(f"continuing at step {self.position.step}, epoch {self.position.epoch + 1}")
        total = self.total_steps()
        with self._stoppable():
            while self._progress(total) < 1 or self.position.group:
                if not self._epoch(optimizer, total):
                    return False
                self._finish_epoch(optimizer)
        (self.folder / NAME).unlink(missing_ok=True)
        return True

    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        total = sum(len(self._groups(epoch)) for epoch in range(self.options.epochs))
        return total if self.options.max_steps is None else min(total, self.options.max_steps)

    def _progress(self, total: int) -> float:
        """The completed fraction of the schedule, by steps or by time."""
        limit = self.options.max_minutes
        spent = 0.0 if limit is None else self.position.seconds / (60 * limit)
        return min(1.0, max(self.position.step / total, spent))

    def _epoch(self, optimizer: torch.optim.Optimizer, total: int) -> bool:
        losses = []
        for group in self._groups(self.position.epoch)[self.position.group :]:
            progress = self._progress(total)
            if progress == 1:
                break
            started = time.monotonic()
            losses.append(self._step(optimizer, group, progress or 1 / total))
            self.position.group += 1
            self.position.step += 1
            if self.position.step % 10 == 0 or self.position.step == total:
                note = f"epoch {self.position.epoch + 1} loss {torch.stack(losses[-50:]).mean().item():.3f}"
                self.reporter.update("training", self.position.step, total, note)
            self.position.seconds += time.monotonic() - started
            if self.interrupted or self.position.step % self.save_every == 0:
                self._save(optimizer)
                if self.interrupted:
                    return False
        self._loss = torch.stack(losses[-200:]).mean().item() if losses else None
        return True

    def _step(
        self, optimizer: torch.optim.Optimizer, group: Sequence[tuple[int, ...]], progress: float
    ) -> torch.Tensor:
        rate = self.options.learning_rate * schedule(progress, self.options.warmup)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        losses = [self._backward(collate(self.train, indices, self.target.device), len(group)) for indices in group]
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.options.clip)
        optimizer.step()
        return torch.stack(losses).mean()

    def _backward(self, batch: Batch, shares: int) -> torch.Tensor:
        given = self.states(batch)
        with autocast(batch.ids.device):
            outputs = unroll(self.head, given.features, batch.ids, self.options.steps)
            return backward(
                self.head,
                outputs,
                given.final.flatten(0, 1),
                batch.labels,
                batch.ids.shape[1],
                self.target.logits,
                self.options.step_decay,
                1 / shares,
            )

    def _finish_epoch(self, optimizer: torch.optim.Optimizer) -> None:
        found = evaluate(self.head.eval(), self.target, self.states, self._measured(), self.options.measured_steps)
        self.head.train()
        self.position.epoch += 1
        self.position.group = 0
        self.history.append(
            {
                "epoch": self.position.epoch,
                "step": self.position.step,
                "loss": self._loss,
                "held_out": {
                    name: [round(v, 4) for v in value] if isinstance(value, tuple) else round(value, 4)
                    for name, value in attrs.asdict(found).items()
                },
            }
        )
        seconds = self.position.seconds / max(self.position.step, 1)
        steps = " ".join(f"{value:.3f}" for value in found.agreement)
        self.reporter.line(
            f"epoch {self.position.epoch}: held-out acceptance length with "
            f"{self.options.measured_steps} drafts {found.greedy_length:.2f} greedy, {found.sampled_length:.2f} sampled; "
            f"agreement by step {steps}; {seconds:.3f} s a step"
        )
        self.write()
        device = self.target.device
        record = {
            "options": attrs.asdict(self.options),
            "texts": len(self.train),
            "tokens": sum(len(sample) for sample in self.train),
            "seconds": round(self.position.seconds, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "torch": torch.__version__,
            "epochs": self.history,
        }
        (self.folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self._save(optimizer)

    def _measured(self) -> Iterator[Batch]:
        lengths = [len(sample) for sample in self.held_out]
        everything = [*self.train, *self.held_out]
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        for indices in fill(order, lengths, self.options.batch_tokens):
            yield collate(everything, tuple(len(self.train) + i for i in indices), self.target.device)

    def _groups(self, epoch: int) -> list[list[tuple[int, ...]]]:
        lengths = [len(sample) for sample in self.train]
        batches = plan_epoch(lengths, self.options.batch_tokens, self.options.seed, epoch)
        size = self.options.accumulate
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.options.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        on_gpu = self.target.device.type == "cuda"
        return torch.optim.AdamW(groups, lr=self.options.learning_rate, betas=(0.9, 0.95), fused=on_gpu)

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        save_state(self.folder, self.run, self.position, self.head, optimizer, self.history)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first interrupt ends the run after the current step and saves its state; the second ends it at once."""

        def stop(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            self.reporter.line("stopping after this step; interrupt again to stop at once")

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def schedule(progress: float, warmup: float) -> float:
    """The learning rate as a fraction of the peak: linear warm-up, then a cosine to zero over the `progress` of the run."""
    if progress < warmup:
        return progress / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))
