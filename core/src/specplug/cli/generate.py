"""`specplug generate`: text from a target, as it is generated."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from specplug.cli.engine_options import draft_options, engine_options, read_engine_options
from specplug.cli.libraries import check_plugins
from specplug.cli.option_groups import GroupedCommand, named, option_group
from specplug.cli.sampling_options import (
    DEFAULTS,
    length_options,
    make_params,
    penalty_options,
    read_sampling_options,
    report_options,
    sampling_options,
)
from specplug.cli.terminal import Terminal
from specplug.errors import ConfigurationError, RequestError

if TYPE_CHECKING:
    from specplug.cli.prompt_file import PromptLine

_ENGINE = (
    "speculative_config",
    "memory",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "dtype",
    "device",
    "revision",
    "tokenizer",
    "skip_tokenizer_init",
    "trust_remote_code",
    "allow_plugin",
    "deny_plugin",
    "strict",
)
_MOST_ROWS = 32
_prompt_options = option_group(
    "Prompt",
    named("--prompt", metavar="TEXT", help="What to continue; - reads standard input."),
    named("--prompts", metavar="FILE", help="Many: JSON lines, see above; - reads standard input."),
)


@click.command(cls=GroupedCommand, short_help="Generate text with a model, as it comes.")
@click.argument("target")
@_prompt_options
@sampling_options
@penalty_options
@length_options
@engine_options
@draft_options
@report_options
def generate(
    target: str, prompt: str | None, prompts: str | None, as_json: bool, stats: bool, quiet: bool, **given: Any
) -> None:
    """Generate text with TARGET: a folder, a hub name, or tiny, the model that comes with specplug.

    The text goes to standard output as it is generated, everything else to standard error. On a terminal, text that a
    speculator drafted and the target accepted is coloured. Sampling options that are not given are those of the model's
    generation_config.

    A line of --prompts is a JSON string, or an object with "prompt" or "prompt_token_ids", and perhaps
    "sampling_params", an object that overrides the options for this line, such as {"temperature": 0.7}.

    \b
    Examples:
      specplug generate tiny --prompt "import os" --stats
      specplug generate tiny --prompts prompts.jsonl --json > outputs.jsonl
      specplug generate org/model --prompt "Once upon a time" --max-tokens 200 \\
        --speculative-config '{"method": "ngram", "num_speculative_tokens": 5}'
    """  # noqa: D301
    if (prompt is None) == (prompts is None):
        problem = (
            "Missing option '--prompt' or '--prompts'"
            if prompt is None
            else "--prompt and --prompts exclude each other"
        )
        raise click.UsageError(f"{problem}.")
    if not as_json and (given["logprobs"] is not None or given["prompt_logprobs"] is not None):
        raise click.UsageError("--logprobs and --prompt-logprobs are shown with --json only.")
    # What can be refused without importing torch is refused first.
    from specplug.cli.prompt_file import read_prompts
    from specplug.config.engine import EngineConfig

    engine = read_engine_options({name: given.pop(name) for name in _ENGINE})
    sampling = read_sampling_options(given)
    if prompts is not None:
        lines = read_prompts(prompts)
    else:
        lines = [_given(prompt or "")]
    rows = sum(_checked(line, sampling) for line in lines)
    engine.setdefault("max_num_seqs", min(rows, _MOST_ROWS, max(engine.get("max_num_batched_tokens", rows), 1)))
    config = EngineConfig.create(target, **engine)

    from specplug.cli.generate_run import GenerateJob, run_job

    job = GenerateJob(
        target, engine, lines, sampling, is_file=prompts is not None, as_json=as_json, stats=stats, quiet=quiet
    )
    out, err = Terminal.out(), Terminal.err()
    with contextlib.redirect_stdout(sys.stderr):  # standard output gets the text, whatever a plugin may print
        check_plugins(config)
        run_job(job, out, err)


def _given(prompt: str) -> PromptLine:
    """The prompt of `--prompt`.

    Raises:
        ConfigurationError: it is no valid text.
    """
    from specplug.cli.prompt_file import PromptLine, checked_text

    where = "--prompt"
    if prompt == "-":
        where = "--prompt -"
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{where}: standard input is not UTF-8 at byte {error.start + 1}") from error
    return PromptLine(where, checked_text(prompt, where))


def _checked(line: PromptLine, sampling: dict[str, Any]) -> int:
    """How many completions a prompt asks for, if its parameters are good ones.

    Raises:
        RequestError: they are not; the message names the line where it has parameters of its own.
    """
    try:
        return make_params(DEFAULTS, sampling, line.options).n
    except RequestError as error:
        if not line.options:
            raise
        raise RequestError(f"{line.where}: {error}") from error
