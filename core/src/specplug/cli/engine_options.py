"""The options that `generate`, `plan` and `bench` share: the target, its engine, and the plugins that may be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specplug.cli.option_groups import named, option_group
from specplug.cli.speculative_option import read_speculative_config

if TYPE_CHECKING:
    from collections.abc import Callable

_SPECULATION = "Speculation"
_one_method = option_group(
    _SPECULATION,
    named("--speculative-config", metavar="JSON|FILE", help="The method and its keys. [default: plain decoding]"),
)
_several_methods = option_group(
    _SPECULATION,
    named(
        "--speculative-config",
        "speculative_configs",
        metavar="JSON|FILE",
        multiple=True,
        help="A method and its keys. Repeatable; plain decoding is always there.",
    ),
)
_plugins = option_group(
    _SPECULATION,
    named("--allow-plugin", metavar="NAME", multiple=True, help="Load only this method or package. Repeatable."),
    named("--deny-plugin", metavar="NAME", multiple=True, help="Do not load this method or package. Repeatable."),
)
_engine = option_group(
    "Engine",
    named("--memory", metavar="SIZE", help="For weights, caches and buffers together, such as 8GiB."),
    named("--max-model-len", type=int, metavar="N", help="The longest sequence, prompt and output."),
    named("--max-num-seqs", type=int, metavar="N", help="The most sequences in a batch."),
    named("--max-num-batched-tokens", type=int, metavar="N", help="The most tokens in one step, drafts included."),
    named(
        "--max-num-draft-tokens", type=int, metavar="N", help="The most draft tokens one step verifies, over all rows."
    ),
    named("--block-size", type=int, metavar="N", help="Tokens of a KV block."),
    named("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, ... [default: the checkpoint's own]"),
    named("--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N. [default: a GPU if there is one]"),
    named("--compile/--no-compile", default=None, help="Compile forwards, or never. [default: where it pays]"),
    named("--revision", metavar="NAME", help="The target's revision on the hub."),
    named("--tokenizer", metavar="NAME", help="Another folder or hub name for the tokenizer."),
    named("--skip-tokenizer-init", is_flag=True, help="Run on token ids alone."),
    named("--trust-remote-code", is_flag=True, help="Let code that comes with the target run."),
)
draft_options = option_group(
    _SPECULATION,
    named("--num-speculative-tokens", type=int, metavar="N", help="At most so many draft tokens a step; 0: none."),
    named("--strict", is_flag=True, help="Fail when a speculator fails, instead of going on without its drafts."),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the shared options."""
    return _one_method(_plugins(_engine(command)))


def bench_engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the shared options, with any number of speculative configurations."""
    return _several_methods(_plugins(_engine(command)))


def read_engine_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of the command line → keywords of `LLM`; options that were not given are left out.

    Raises:
        ConfigurationError: the speculative config cannot be read.
    """
    options = {name: value for name, value in given.items() if value is not None}
    options["speculative_config"] = read_speculative_config(options.pop("speculative_config", None))
    options["allowed_plugins"] = options.pop("allow_plugin") or None
    options["denied_plugins"] = options.pop("deny_plugin")
    return options
