"""Runs `specplug bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from specplug.cli.process import import_libraries
from specplug.cli.views.startup import StartupView
from specplug.errors import InsufficientMemoryError, RequestError

if TYPE_CHECKING:
    from specplug.bench.comparison import Comparison
    from specplug.bench.contestants import Contestant
    from specplug.bench.report import About
    from specplug.bench.workload import BenchPrompt
    from specplug.cli.inputs import PromptLine
    from specplug.cli.terminal import Terminal

_STDOUT = "-"


@attrs.frozen
class BenchJob:
    """The input of `specplug bench`.

    Attributes:
        target: the model.
        configs: the speculative configurations.
        engine: keywords of `LLM`.
        lines: the prompts; empty for the built-in prompts.
        batches: numbers of concurrent sequences.
        temperatures: of sampling.
        max_tokens: generated for each prompt.
        repetitions: of each measurement.
        peer: a library to compare with.
        one_at_a_time: keep only one engine in memory.
        json_file: receives the report; `-` is standard output.
        plot: receives the plot.
        quiet: hide startup steps and progress.
    """

    target: str
    configs: Sequence[Mapping[str, Any]]
    engine: dict[str, Any]
    lines: Sequence[PromptLine]
    batches: Sequence[int]
    temperatures: Sequence[float]
    max_tokens: int
    repetitions: int
    peer: str | None
    one_at_a_time: bool
    json_file: str | None
    plot: str | None
    quiet: bool


def run_bench(job: BenchJob, out: Terminal, err: Terminal) -> None:
    """Measures and reports.

    Args:
        job: the input.
        out: receives the results.
        err: receives everything else.

    Raises:
        SpecplugError: an engine does not start, a prompt cannot be served, or a file cannot be written.
    """
    with StartupView(err, quiet=job.quiet) as view:
        view.announce("importing PyTorch and Transformers")
        import_libraries()
        from specplug.bench.plot import check_plot, save_plot
        from specplug.bench.report import as_json
        from specplug.bench.summary import summarize
        from specplug.cli.views.bench import show_comparison

        if job.plot is not None:
            check_plot(job.plot)
        comparison, about = _measure(job, view, err)
    summaries = summarize(comparison)
    report = json.dumps(as_json(about, summaries), indent=2)
    if job.json_file == _STDOUT:
        out.line(report)
    else:
        show_comparison(out, about, summaries)
    if job.json_file not in (None, _STDOUT):
        Path(str(job.json_file)).write_text(report + "\n", encoding="utf-8")
    if job.plot is not None:
        save_plot(job.plot, about, summaries)
        if not job.quiet:
            err.paragraph(f"Plot written to {job.plot}", style="dim")


def _measure(job: BenchJob, view: StartupView, err: Terminal) -> tuple[Comparison, About]:
    from specplug.bench.comparison import compare, tokens_to_generate
    from specplug.bench.report import About, describe_machine, describe_versions
    from specplug.bench.workload import Cell, Workload
    from specplug.cli.run.bench_progress import BenchProgress
    from specplug.model.device import choose_device
    from specplug.model.load.checkpoint import choose_dtype, load_config, resolve_checkpoint
    from specplug.tiny import resolve_model

    workload = Workload("built in" if not job.lines else "prompts", _prompts(job), job.max_tokens)
    cells = [Cell(batch, temperature) for temperature in job.temperatures for batch in job.batches]
    contestants = _contestants(job)

    def total() -> int:
        return tokens_to_generate(contestants, cells, workload, job.repetitions, one_at_a_time=job.one_at_a_time)

    with BenchProgress(err, view, total, job.repetitions, quiet=job.quiet) as progress:
        try:
            comparison = compare(
                contestants, cells, workload, job.repetitions, progress.watcher, one_at_a_time=job.one_at_a_time
            )
        except InsufficientMemoryError as error:
            if not job.one_at_a_time:
                error.add_note(f"{len(contestants)} models are in memory; to keep one at a time: --one-at-a-time")
            raise
    device = choose_device(job.engine.get("device", "auto"))
    config = load_config(
        resolve_checkpoint(resolve_model(job.target), job.engine.get("revision")),
        trust_remote_code=job.engine.get("trust_remote_code", False),
    )
    about = About(
        target=job.target,
        dtype=str(choose_dtype(job.engine.get("dtype", "auto"), config)).removeprefix("torch."),
        device=str(device),
        workload=workload.name,
        prompt_tokens=[len(prompt.ids) for prompt in workload.prompts],
        max_tokens=job.max_tokens,
        repetitions=job.repetitions,
        engine={name: value for name, value in job.engine.items() if value not in (None, ())},
        machine=describe_machine(device),
        versions=describe_versions(_method_packages(job.configs)),
    )
    return comparison, about


def _prompts(job: BenchJob) -> list[BenchPrompt]:
    """Returns the prompts as token ids.

    Raises:
        CheckpointError: a prompt is text, and the tokenizer cannot be loaded.
        RequestError: a prompt is text, and `skip_tokenizer_init` is set.
    """
    from specplug.bench.workload import PROMPTS, BenchPrompt
    from specplug.text.prompts import LazyTokenizer, encode_prompt
    from specplug.tiny import resolve_model

    skip = job.engine.get("skip_tokenizer_init", False)
    own = job.engine.get("tokenizer")
    source = None if skip else resolve_model(own or job.target)
    trusted = job.engine.get("trust_remote_code", False)
    tokenizer = LazyTokenizer(source, None if own else job.engine.get("revision"), trust_remote_code=trusted)
    given = [(line.where, line.prompt) for line in job.lines]
    prompts: list[BenchPrompt] = []
    for where, prompt in given or [(f"built-in prompt {i}", text) for i, text in enumerate(PROMPTS, start=1)]:
        try:
            prompts.append(BenchPrompt(where, encode_prompt(prompt, tokenizer)[1]))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from error
    return prompts


def _contestants(job: BenchJob) -> list[Contestant]:
    """Returns plain decoding, the methods and the peer; engines in memory together share the free memory equally."""
    from specplug.bench.contestants import PLAIN, EngineContestant, label_configs
    from specplug.bench.peers import transformers_contestants
    from specplug.engine.memory_plan import default_budget
    from specplug.model.device import choose_device

    options = {"enable_prefix_caching": False, **job.engine}  # prompts are repeated, and would be measured once
    count = 1 + len(job.configs)
    if options.get("memory") is None and not job.one_at_a_time:
        num_models = count + (job.peer is not None)
        options["memory"] = default_budget(choose_device(options.get("device", "auto"))) // num_models
    contestants: list[Contestant] = [EngineContestant(PLAIN, job.target, None, options)]
    for label, config in zip(label_configs(job.configs), job.configs, strict=True):
        contestants.append(EngineContestant(label, job.target, config, options))
    if job.peer is not None:
        contestants += transformers_contestants(job.target, job.configs, options)
    return contestants


def _method_packages(configs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the packages of the methods, with their versions."""
    from specplug.plugins.finder import find_plugins

    used: set[str] = set()
    for config in configs:
        link: Any = config
        while isinstance(link, dict):
            used.add(str(link.get("method")))
            link = link.get("fallback")
    return {record.distribution: record.version for record in find_plugins() if record.method in used}
