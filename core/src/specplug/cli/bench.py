"""`specplug bench`: compares methods with plain decoding, and with a peer, on the user's own model."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specplug.cli.inputs import read_prompts, read_speculative_config
from specplug.cli.options import GroupedCommand, bench_engine_options, named, option_group, read_engine_options
from specplug.cli.process import check_plugins
from specplug.cli.terminal import Terminal
from specplug.errors import ConfigurationError

if TYPE_CHECKING:
    from specplug.cli.inputs import PromptLine

_STDOUT = "-"


class _Numbers(click.ParamType):
    """A comma-separated list of numbers.

    Args:
        kind: the type of a number.
        expected: what the message says was expected.
    """

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], expected: str) -> None:
        self._kind = kind
        self._expected = expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Parses the numbers and drops duplicates."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = [self._kind(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        least = 1 if self._kind is int else 0
        if not numbers or not all(math.isfinite(number) and number >= least for number in numbers):
            self.fail(f"{value!r} is not {self._expected}", param, ctx)
        return tuple(dict.fromkeys(numbers))


_workload_options = option_group(
    "Workload",
    named(
        "--prompts",
        metavar="FILE",
        help="JSON lines, as for generate; - reads standard input. [default: built-in prompts]",
    ),
    named(
        "--max-tokens",
        type=click.IntRange(min=2),
        default=96,
        show_default=True,
        help="Number of tokens to generate for each prompt.",
    ),
    named(
        "--batch",
        "batches",
        type=_Numbers(int, "a list of whole numbers of at least 1, such as 1,4,16"),
        default=(1,),
        metavar="N,...",
        help="Number of concurrent sequences. [default: 1]",
    ),
    named(
        "--temperature",
        "temperatures",
        type=_Numbers(float, "a list of numbers of at least 0, such as 0,1"),
        default=(0.0,),
        metavar="T,...",
        help="0 takes the most likely token. [default: 0]",
    ),
)
_measurement_options = option_group(
    "Measurement",
    named(
        "--peer",
        type=click.Choice(["transformers"]),
        help="Also measure this library, with the same weights, prompts and lengths.",
    ),
    named(
        "--repetitions",
        type=click.IntRange(min=1),
        default=5,
        show_default=True,
        help="Number of repetitions of each measurement.",
    ),
    named(
        "--one-at-a-time",
        is_flag=True,
        help="Keep only one engine in memory; engines are restarted for each repetition.",
    ),
)
_output_options = option_group(
    "Output",
    named("--json", "json_file", metavar="FILE", help="Write all results; - prints them instead of the tables."),
    named(
        "--plot", metavar="FILE", help="Plot speed and acceptance: .png, .svg or .pdf (pip install 'specplug[bench]')."
    ),
    named("-q", "--quiet", is_flag=True, help="Hide startup steps and progress."),
)


@click.command(cls=GroupedCommand, short_help="Measure methods on your own model.")
@click.argument("target")
@_workload_options
@_measurement_options
@bench_engine_options
@_output_options
def bench(
    target: str,
    speculative_configs: tuple[str, ...],
    prompts: str | None,
    peer: str | None,
    json_file: str | None,
    plot: str | None,
    **given: Any,
) -> None:
    """Measure speculation methods on TARGET: a folder, a hub name, or tiny, the model that comes with specplug.

    Plain decoding and every --speculative-config continue the same prompts, in turn, in several repetitions; speeds are
    compared with plain decoding within a repetition. Every output has --max-tokens tokens, so all methods generate the
    same number. One warm-up run of each is not counted. A method that learns from requests gets a new engine for every
    counted run, warmed up on random tokens, so that no prompt is known to it.

    \b
    Examples:
      specplug bench tiny --speculative-config '{"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 1}' \\
        --speculative-config '{"method": "eagle3", "num_speculative_tokens": 3}' --plot methods.png
      specplug bench org/model --prompts mine.jsonl --batch 1,8 --peer transformers --json - \\
        --speculative-config '{"method": "draft_model", "model": "org/draft"}'
    """  # noqa: D301
    if not speculative_configs and peer is None:
        raise click.UsageError("Missing option '--speculative-config' or '--peer'.")
    # Invalid options are refused before the slow import of torch.
    from specplug.config.engine import EngineConfig

    configs = [config for text in speculative_configs if (config := read_speculative_config(text)) is not None]
    options = {name: given.pop(name) for name in ("batches", "temperatures", "max_tokens", "repetitions")}
    flags = {name: given.pop(name) for name in ("one_at_a_time", "quiet")}
    engine = read_engine_options({**given, "speculative_config": None})
    del engine["speculative_config"]
    lines = [] if prompts is None else _checked(read_prompts(prompts))
    largest = max(options["batches"])
    if engine.setdefault("max_num_seqs", largest) < largest:
        raise ConfigurationError(
            f"--batch {largest} is more than --max-num-seqs {engine['max_num_seqs']}; raise --max-num-seqs"
        )
    EngineConfig.create(target, **engine)
    engines = [EngineConfig.create(target, speculative_config=config, **engine) for config in configs]
    if json_file not in (None, _STDOUT) and not Path(str(json_file)).absolute().parent.is_dir():
        raise ConfigurationError(f"--json {json_file!r}: there is no folder {str(Path(str(json_file)).parent)!r}")

    from specplug.cli.run.bench import BenchJob, run_bench

    job = BenchJob(target, configs, engine, lines, peer=peer, json_file=json_file, plot=plot, **options, **flags)
    out, err = Terminal.out(), Terminal.err()
    with contextlib.redirect_stdout(sys.stderr):  # plugins may print; standard output gets only the results
        for each in engines:
            check_plugins(each)
        run_bench(job, out, err)


def _checked(lines: list[PromptLine]) -> list[PromptLine]:
    """Refuses lines with sampling parameters.

    Raises:
        ConfigurationError: a line has sampling parameters of its own.
    """
    for line in lines:
        if line.options:
            raise ConfigurationError(
                f"{line.where}: 'sampling_params' are not supported here; --temperature and --max-tokens apply to "
                "all prompts"
            )
    return lines
