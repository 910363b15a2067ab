"""Starts an engine in six steps. If one fails, the earlier ones are undone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs

from specplug import native, threads
from specplug.config.engine import EngineConfig
from specplug.engine.engine import Engine
from specplug.engine.planning import PlannedEngine, plan_engine
from specplug.engine.startup.allocation import allocate, load_drafts, load_target, start_ranks
from specplug.engine.startup.assembly import assemble
from specplug.engine.startup.report import STEPS, Clock, OnStep, StepReport, startup_step
from specplug.model.compile.runners import compile_forwards, wants_compilation
from specplug.model.load.checkpoint import resolve_checkpoint
from specplug.model.load.parity import check_parity
from specplug.model.load.tokenizer import check_tokenizer
from specplug.model.parallel.ranks import Ranks
from specplug.model.parallel.torchrun import join_first_rank, launched_rank, meeting_folder
from specplug.model.parallel.worker import serve_rank
from specplug.model.torch_state import own_torch_state
from specplug.plugins.lazy_model import LazyModel
from specplug.sampling.defaults import eos_ids
from specplug.tiny import resolve_model

COMPILATION = "compile native kernels (once)"
_starting = threading.RLock()
"""One start at a time: loading and compiling change process-wide state, such as PyTorch's default dtype."""


def start_engine(
    config: EngineConfig, *, tokenizer: Callable[[], Any] = lambda: None, on_step: OnStep = lambda report: None
) -> Engine:
    """Starts an engine.

    Args:
        config: what to run and how.
        tokenizer: gives the target's tokenizer to speculators that request it.
        on_step: called at the beginning, during, and at the end of every step.

    Raises:
        SpecplugError: names the failed step, the cause, and what to change.
        SystemExit: this process was a rank after the first, started by torchrun, and the first one's engine has ended.
    """
    if launched_rank(config.tensor_parallel_size):
        serve_rank(join_first_rank(meeting_folder()))
        raise SystemExit(0)
    with own_torch_state(), _starting, ExitStack() as undo:
        with startup_step(1, on_step) as clock:
            planned = plan_engine(config, tokenizer=tokenizer, before_kernels=lambda: _compile_kernels(on_step, clock))
            undo.callback(planned.facade.close)
            if not config.skip_tokenizer_init:
                check_tokenizer(_tokenizer_folder(planned))
            if planned.device.type == "cpu":
                threads.warn_of_too_many()
            ends = eos_ids(planned.folder, planned.model_config, planned.architecture.vocab_size)
        ranks: Ranks | None = None
        with startup_step(2, on_step):
            if config.tensor_parallel_size > 1:
                ranks = start_ranks(planned)
                undo.callback(ranks.close)
            model = load_target(planned, ranks)
            planned.facade.attach(model)
        with startup_step(3, on_step):
            load_drafts(planned, on_step)
        with startup_step(4, on_step):
            runner, states, caches = allocate(planned, model, ranks)
            undo.callback(runner.close)
        with startup_step(5, on_step):
            if config.check_parity:
                check_parity(
                    runner, planned.model_config, config.block_size, trust_remote_code=config.trust_remote_code
                )
            if wants_compilation(config.compile, planned.architecture.weight_bytes):
                drafts = [h.runner for h in planned.facade.handles if isinstance(h, LazyModel) and h.runner]
                if ranks is not None:
                    ranks.order("compile", planned.most_captured, planned.num_entries)
                compile_forwards([runner, *drafts], planned.most_captured, planned.num_entries)
            engine = assemble(planned, runner, states, caches, tokenizer, ends)
        with startup_step(6, on_step):
            undo.pop_all()
        return engine


def _compile_kernels(on_step: OnStep, clock: Clock) -> None:
    """Compiles the native kernels if necessary, and reports that as a step of its own within the first."""
    if not native.must_be_compiled():
        return
    report = StepReport(0, COMPILATION)
    on_step(report)
    started = time.perf_counter()
    native.load(lambda seconds: on_step(attrs.evolve(report, elapsed=seconds)))
    clock.left_out = time.perf_counter() - started
    on_step(StepReport(0, COMPILATION, clock.left_out, 1.0))
    on_step(StepReport(1, STEPS[0]))


def _tokenizer_folder(planned: PlannedEngine) -> Path:
    config = planned.config
    if config.tokenizer is None:
        return planned.folder
    return resolve_checkpoint(resolve_model(config.tokenizer), trust_remote_code=config.trust_remote_code)
