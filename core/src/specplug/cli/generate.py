"""`specplug generate`: text from a target, as it is generated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import attrs
import click

from specplug.cli.inputs import PromptLine, checked_text, read_prompts
from specplug.cli.options import (
    DEFAULTS,
    GroupedCommand,
    draft_options,
    engine_options,
    length_options,
    lora_options,
    make_params,
    named,
    option_group,
    option_names,
    penalty_options,
    read_engine_options,
    read_sampling_options,
    report_options,
    sampling_options,
)
from specplug.cli.process import check_plugins
from specplug.cli.terminal import Terminal
from specplug.errors import ConfigurationError, RequestError
from specplug.values import shown

_MAX_SEQS = 32
_prompt_options = option_group(
    "Prompt",
    named("--prompt", metavar="TEXT", help="Text to continue; - reads standard input."),
    named("--lora", metavar="NAME", help="Use this adapter of --lora-modules, for lines that name none."),
    named("--prompts", metavar="FILE", help="Many prompts as JSON lines, see above; - reads standard input."),
)


@click.command(
    cls=GroupedCommand, short_help="Generate text with a model.", context_settings={"allow_extra_args": True}
)
@click.argument("target")
@_prompt_options
@sampling_options
@penalty_options
@length_options
@engine_options
@lora_options
@draft_options
@report_options
@click.pass_context
def generate(
    ctx: click.Context,
    target: str,
    prompt: str | None,
    prompts: str | None,
    lora: str | None,
    as_json: bool,
    stats: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Generate text with TARGET: a folder, a hub name, or tiny, the model that comes with specplug.

    The text goes to standard output as it is generated, everything else to standard error. On a terminal, accepted draft
    tokens are coloured. Sampling options default to the generation_config of the model.

    A line of --prompts is a JSON string, or an object with "prompt" or "prompt_token_ids". The optional key
    "sampling_params" is an object that overrides the options for this line, such as {"temperature": 0.7}; "lora" is the name
    of the adapter for this line.

    \b
    Examples:
      specplug generate tiny --prompt "import os" --stats
      specplug generate tiny --prompts prompts.jsonl --json > outputs.jsonl
      specplug generate org/model --prompt "Once upon a time" --max-tokens 200 \\
        --speculative-config '{"method": "ngram", "num_speculative_tokens": 5}'
    """  # noqa: D301
    if ctx.args:
        words = shown(" ".join(ctx.args))
        raise click.UsageError(f"Got unexpected extra argument {words}; give the prompt with --prompt, in quotes.")
    if (prompt is None) == (prompts is None):
        problem = (
            "Missing option '--prompt' or '--prompts'"
            if prompt is None
            else "--prompt and --prompts exclude each other"
        )
        raise click.UsageError(f"{problem}.")
    if not as_json and (given["logprobs"] is not None or given["prompt_logprobs"] is not None):
        raise click.UsageError("--logprobs and --prompt-logprobs require --json.")
    # Invalid options are refused before the slow import of torch.
    from specplug.config.engine import EngineConfig

    names = [*option_names(engine_options, lora_options), "strict"]
    engine = read_engine_options({name: given.pop(name) for name in names})
    sampling = read_sampling_options(given)
    lines = [_read_prompt(prompt or "")] if prompts is None else read_prompts(prompts)
    lines = [line if line.lora else attrs.evolve(line, lora=lora) for line in lines]
    rows = sum(_count_completions(line, sampling) for line in lines)
    engine.setdefault("max_num_seqs", min(rows, _MAX_SEQS, max(engine.get("max_num_batched_tokens", rows), 1)))
    config = EngineConfig.create(target, **engine)
    _check_adapters(lines, [module.lora_name for module in config.lora_modules])

    from specplug.cli.run.generate import GenerateJob, run_job

    job = GenerateJob(
        target, engine, lines, sampling, is_file=prompts is not None, as_json=as_json, stats=stats, quiet=quiet
    )
    out, err = Terminal.out(), Terminal.err()
    with contextlib.redirect_stdout(sys.stderr):  # plugins may print; standard output gets only the text
        check_plugins(config)
        run_job(job, out, err)


def _check_adapters(lines: Sequence[PromptLine], names: Sequence[str]) -> None:
    """Refuses adapters that are not given.

    Raises:
        ConfigurationError: the message names the line.
    """
    for line in lines:
        if line.lora and line.lora not in names:
            given = f"given: {', '.join(names)}" if names else "none is given"
            raise ConfigurationError(f"{line.where}: no adapter '{line.lora}' ({given}); give it with --lora-modules")


def _read_prompt(prompt: str) -> PromptLine:
    """Reads the prompt of `--prompt`.

    Raises:
        ConfigurationError: it is not valid text, or standard input is empty.
    """
    where = "--prompt"
    if prompt == "-":
        where = "--prompt -"
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{where}: standard input is not UTF-8 at byte {error.start + 1}") from error
        if not prompt:
            raise ConfigurationError(f"{where}: the prompt is empty: standard input has no text")
    return PromptLine(where, checked_text(prompt, where))


def _count_completions(line: PromptLine, sampling: dict[str, Any]) -> int:
    """Returns the number of completions that a prompt asks for.

    Raises:
        RequestError: its parameters are invalid; the message names the line if it has parameters of its own.
    """
    try:
        return make_params(DEFAULTS, sampling, line.options).n
    except RequestError as error:
        if not line.options:
            raise
        raise RequestError(f"{line.where}: {error}") from error
