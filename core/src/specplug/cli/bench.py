"""`specplug bench`: methods beside plain decoding, and beside a peer, on the user's own model."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specplug.cli.engine_options import bench_engine_options, read_engine_options
from specplug.cli.libraries import check_plugins
from specplug.cli.option_groups import GroupedCommand, named, option_group
from specplug.cli.speculative_option import read_speculative_config
from specplug.cli.terminal import Terminal
from specplug.errors import ConfigurationError

if TYPE_CHECKING:
    from specplug.cli.prompt_file import PromptLine

_STDOUT = "-"


class _Numbers(click.ParamType):
    """Numbers with commas between them.

    Args:
        kind: of a number.
        expected: for the message.
    """

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], expected: str) -> None:
        self._kind = kind
        self._expected = expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Reads them; each counts once."""
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
    named("--prompts", metavar="FILE", help="JSON lines, as for generate; - reads standard input. [default: built in]"),
    named("--max-tokens", type=click.IntRange(min=2), default=96, show_default=True, help="Generated for each prompt."),
    named(
        "--batch",
        "batches",
        type=_Numbers(int, "a list of whole numbers of at least 1, such as 1,4,16"),
        default=(1,),
        metavar="N,...",
        help="Sequences generated at a time. [default: 1]",
    ),
    named(
        "--temperature",
        "temperatures",
        type=_Numbers(float, "a list of numbers of at least 0, such as 0,1"),
        default=(0.0,),
        metavar="T,...",
        help="0 always takes the likeliest token. [default: 0]",
    ),
)
_measurement_options = option_group(
    "Measurement",
    named(
        "--peer", type=click.Choice(["transformers"]), help="Measure it too, on the same weights, prompts and counts."
    ),
    named("--repetitions", type=click.IntRange(min=1), default=5, show_default=True, help="Of every measurement."),
    named(
        "--one-at-a-time",
        is_flag=True,
        help="Hold one engine in memory at a time; each is started for each repetition.",
    ),
)
_output_options = option_group(
    "Output",
    named("--json", "json_file", metavar="FILE", help="Write everything that was measured; - prints it, and no table."),
    named(
        "--plot", metavar="FILE", help="Draw speed and acceptance: .png, .svg or .pdf (pip install 'specplug[bench]')."
    ),
    named("-q", "--quiet", is_flag=True, help="Do not show the startup steps and the progress."),
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

    Plain decoding and every --speculative-config generate the same prompts, in turn, several times over; the speed of each
    is compared with plain decoding's of the same repetition. Everything is generated to --max-tokens, so that all
    generate the same number of tokens. One run of each is not counted. A method that learns from requests gets a fresh
    engine for every counted run, and is warmed up on random tokens: it has seen no prompt before it counts.

    \b
    Examples:
      specplug bench tiny --speculative-config '{"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 1}' \\
        --speculative-config '{"method": "eagle3", "num_speculative_tokens": 3}' --plot methods.png
      specplug bench org/model --prompts mine.jsonl --batch 1,8 --peer transformers --json - \\
        --speculative-config '{"method": "draft_model", "model": "org/draft"}'
    """  # noqa: D301
    if not speculative_configs and peer is None:
        raise click.UsageError("Missing option '--speculative-config' or '--peer'.")
    # What can be refused without importing torch is refused first.
    from specplug.cli.prompt_file import read_prompts
    from specplug.config.engine import EngineConfig

    configs = [config for text in speculative_configs if (config := read_speculative_config(text)) is not None]
    options = {name: given.pop(name) for name in ("batches", "temperatures", "max_tokens", "repetitions")}
    flags = {name: given.pop(name) for name in ("one_at_a_time", "quiet")}
    engine = read_engine_options({**given, "speculative_config": None})
    del engine["speculative_config"]
    lines = [] if prompts is None else _checked(read_prompts(prompts))
    most = max(options["batches"])
    if engine.setdefault("max_num_seqs", most) < most:
        raise ConfigurationError(f"--batch {most} is more than --max-num-seqs {engine['max_num_seqs']}; raise it")
    EngineConfig.create(target, **engine)
    engines = [EngineConfig.create(target, speculative_config=config, **engine) for config in configs]
    if json_file not in (None, _STDOUT) and not Path(str(json_file)).absolute().parent.is_dir():
        raise ConfigurationError(f"--json {json_file!r}: there is no folder {str(Path(str(json_file)).parent)!r}")

    from specplug.cli.bench_run import BenchJob, run_bench

    job = BenchJob(target, configs, engine, lines, peer=peer, json_file=json_file, plot=plot, **options, **flags)
    out, err = Terminal.out(), Terminal.err()
    with contextlib.redirect_stdout(sys.stderr):  # standard output gets the results, whatever a plugin may print
        for each in engines:
            check_plugins(each)
        run_bench(job, out, err)


def _checked(lines: list[PromptLine]) -> list[PromptLine]:
    """Refuses what a line cannot choose here.

    Raises:
        ConfigurationError: a line has sampling parameters of its own.
    """
    for line in lines:
        if line.options:
            raise ConfigurationError(
                f"{line.where}: 'sampling_params' are not used here; all prompts are generated alike, with --temperature "
                "and --max-tokens"
            )
    return lines
