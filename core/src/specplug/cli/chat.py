"""`specplug chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from specplug.cli.inputs import checked_text, read_template
from specplug.cli.options import (
    GroupedCommand,
    draft_options,
    engine_options,
    make_params,
    named,
    option_group,
    penalty_options,
    read_engine_options,
    read_sampling_options,
    sampling_options,
)
from specplug.cli.process import check_plugins
from specplug.cli.terminal import Terminal

_DEFAULTS: dict[str, Any] = {"max_tokens": 512, "temperature": 0.0}
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "n",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "bad_word",
    "allowed_token_id",
    "max_tokens",
    "stop",
    "num_speculative_tokens",
)
_chat_options = option_group(
    "Chat",
    named("--system", metavar="TEXT", help="System message; /system changes it."),
    named("--chat-template", metavar="FILE", help="A Jinja template instead of the tokenizer's."),
    named(
        "--no-chat-template",
        is_flag=True,
        help="Let the model continue the bare text. [default: where the model has no template]",
    ),
    named("--max-tokens", type=int, metavar="N", help="Maximum number of tokens of an answer. [default: 512]"),
    named("--stop", metavar="TEXT", multiple=True, help="Stop before this text. Repeatable."),
    named("-q", "--quiet", is_flag=True, help="Hide startup steps and hints."),
)


@click.command(cls=GroupedCommand, short_help="Chat with a model in the terminal.")
@click.argument("target")
@_chat_options
@sampling_options
@penalty_options
@engine_options
@draft_options
def chat(
    target: str, system: str | None, chat_template: str | None, no_chat_template: bool, quiet: bool, **given: Any
) -> None:
    """Chat with TARGET: a folder, a hub name, or tiny, the model that comes with specplug.

    Answers are streamed; on a terminal, accepted draft tokens are coloured. /help lists the commands. Ctrl-C stops an answer,
    Ctrl-D ends the chat. A line that ends with a backslash is continued. Without a terminal, each line of standard input is a
    message.

    \b
    Examples:
      specplug chat tiny --speculative-config '{"method": "draft_model", "model": "tiny", "num_speculative_tokens": 3}'
      specplug chat org/model --system "Answer in one sentence." --temperature 0.7
    """  # noqa: D301
    if chat_template is not None and no_chat_template:
        raise click.UsageError("--chat-template and --no-chat-template exclude each other.")
    from specplug.config.engine import EngineConfig

    sampling = read_sampling_options({name: given.pop(name) for name in _SAMPLING})
    if sampling.get("n", 1) != 1:
        raise click.UsageError("--n: a chat has one answer to each message.")
    make_params(_DEFAULTS, sampling)
    engine = read_engine_options(given)
    engine.setdefault("max_num_seqs", 1)
    config = EngineConfig.create(target, **engine)

    from specplug.cli.run.chat import ChatJob, run_job

    job = ChatJob(
        target,
        engine,
        _DEFAULTS,
        sampling,
        system=None if system is None else checked_text(system, "--system"),
        template=None if chat_template is None else read_template(chat_template),
        has_template=not no_chat_template,
        quiet=quiet,
    )
    out, err = Terminal.out(), Terminal.err()
    with contextlib.redirect_stdout(sys.stderr):  # plugins may print
        check_plugins(config)
    run_job(job, out, err)
