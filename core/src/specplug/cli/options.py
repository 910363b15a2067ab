"""The options that commands share, in named groups, and the keywords of `LLM` and `SamplingParams` that they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from specplug.cli.inputs import parse_json, read_speculative_config
from specplug.errors import ConfigurationError, RequestError, did_you_mean

if TYPE_CHECKING:
    from specplug.sampling.params import SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])


class GroupedOption(click.Option):
    """An option that the help text lists under the name of a group.

    Args:
        group: its name; options without one come last.
        arguments: those of `click.Option`.
    """

    def __init__(self, *arguments: Any, group: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help text has one section for each group of options, in the order of declaration."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the sections."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "group", ""), []).append(record)
        rest = groups.pop("", [])
        for name, records in (*groups.items(), ("Other", rest)):
            if records:
                with formatter.section(f"{name} options"):
                    formatter.write_dl(records)


def option_group(name: str, *options: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[Command], Command]:
    """Returns a decorator that adds several options to a command.

    Args:
        name: of the group.
        options: results of `named`.
    """

    def apply(command: Command) -> Command:
        for names, details in reversed(options):
            command = click.option(*names, cls=GroupedOption, group=name, **details)(command)
        return command

    return apply


def named(*names: str, **details: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Returns an option for `option_group`; the arguments are those of `click.option`."""
    return names, details


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
        help="A method and its keys. Repeatable; plain decoding is always measured.",
    ),
)
_plugins = option_group(
    _SPECULATION,
    named("--allow-plugin", metavar="NAME", multiple=True, help="Load only this method or package. Repeatable."),
    named("--deny-plugin", metavar="NAME", multiple=True, help="Do not load this method or package. Repeatable."),
)
_engine = option_group(
    "Engine",
    named("--memory", metavar="SIZE", help="Budget for weights, caches and buffers, such as 8GiB."),
    named("--max-model-len", type=int, metavar="N", help="Maximum length of a sequence, prompt and output."),
    named("--max-num-seqs", type=int, metavar="N", help="Maximum number of sequences in a batch."),
    named(
        "--max-num-batched-tokens", type=int, metavar="N", help="Maximum number of tokens in a step, drafts included."
    ),
    named(
        "--max-num-draft-tokens",
        type=int,
        metavar="N",
        help="Maximum number of draft tokens in a step, over all sequences.",
    ),
    named("--block-size", type=int, metavar="N", help="Number of tokens in a KV block."),
    named(
        "--tensor-parallel-size",
        type=int,
        metavar="N",
        help="Number of processes that share the target, each on a GPU or on a part of the cores.",
    ),
    named(
        "--scheduling-policy",
        type=click.Choice(["fcfs", "priority"]),
        help="Order of requests: first come, first served, or by their priority. [default: fcfs]",
    ),
    named(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        default=None,
        help="Keep the KV of prompts for requests that begin alike. [default: yes]",
    ),
    named("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, ... [default: the checkpoint's own]"),
    named(
        "--quantization", metavar="NAME", help="int8: quantise the target's linear layers when it is loaded. [CPU only]"
    ),
    named("--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N. [default: a GPU if there is one]"),
    named(
        "--compile/--no-compile",
        default=None,
        help="Always or never compile the forward pass. [default: where it pays off]",
    ),
    named("--revision", metavar="NAME", help="The target's revision on the hub."),
    named("--tokenizer", metavar="NAME", help="Another folder or hub name for the tokenizer."),
    named("--skip-tokenizer-init", is_flag=True, help="Use token ids only."),
    named("--trust-remote-code", is_flag=True, help="Run code from the checkpoint of the target."),
)
lora_options = option_group(
    "LoRA",
    named(
        "--lora-modules",
        metavar="NAME=PATH",
        multiple=True,
        help="Load this adapter at the start; also JSON with name and path. Repeatable.",
    ),
    named("--enable-lora", is_flag=True, default=None, help="Make room for adapters that are loaded later."),
    named("--max-loras", type=int, metavar="N", help="Most adapters at once. [default: those given, at least 4]"),
    named("--max-lora-rank", type=int, metavar="N", help="Largest rank. [default: of those given, at least 16]"),
)
draft_options = option_group(
    _SPECULATION,
    named(
        "--num-speculative-tokens",
        type=int,
        metavar="N",
        help="Maximum number of draft tokens per sequence and step; 0: none.",
    ),
    named("--strict", is_flag=True, help="Fail when a speculator fails, instead of continuing without its drafts."),
)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the shared options to a command."""
    return _one_method(_plugins(_engine(command)))


def bench_engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the shared options to a command, with any number of speculative configurations."""
    return _several_methods(_plugins(_engine(command)))


def option_names(*groups: Callable[[Callable[..., Any]], Callable[..., Any]]) -> list[str]:
    """The names of the options that decorators add to a command, as its function is given them."""

    def command() -> None:
        """Takes the options."""

    for group in groups:
        group(command)
    options: list[click.Option] = vars(command)["__click_params__"]
    return [str(option.name) for option in options]


def read_engine_options(given: dict[str, Any]) -> dict[str, Any]:
    """Converts command-line options to keywords of `LLM`; options that were not given are left out.

    Raises:
        ConfigurationError: the speculative config cannot be read.
    """
    options = {name: value for name, value in given.items() if value is not None}
    options["speculative_config"] = read_speculative_config(options.pop("speculative_config", None))
    options["allowed_plugins"] = options.pop("allow_plugin") or None
    options["denied_plugins"] = options.pop("deny_plugin")
    if modules := options.pop("lora_modules", None):
        options["lora_modules"] = [_read_lora_module(module) for module in modules]
    return options


def _read_lora_module(given: str) -> dict[str, Any]:
    """One value of `--lora-modules` → name and path.

    Raises:
        ConfigurationError: it is neither NAME=PATH nor a JSON object.
    """
    if given.lstrip().startswith("{"):
        module = parse_json(given, "--lora-modules")
        if isinstance(module, dict):
            return module
    name, equals, path = given.partition("=")
    if not (name and equals and path):
        raise ConfigurationError(
            f"--lora-modules {given}: expected NAME=PATH, or a JSON object such as "
            '{"name": "sql", "path": "adapters/sql"}'
        )
    return {"name": name, "path": path}


DEFAULTS: dict[str, Any] = {"max_tokens": 128, "temperature": 0.0}
_NAMES = {
    "bad_word": "bad_words",
    "allowed_token_id": "allowed_token_ids",
    "stop_token_id": "stop_token_ids",
    "include_stop": "include_stop_str_in_output",
}

sampling_options = option_group(
    "Sampling",
    named(
        "--temperature",
        type=float,
        metavar="T",
        help="0 takes the most likely token. [default: 0, or the model's]",
    ),
    named("--top-k", type=int, metavar="K", help="Sample from the K most likely tokens; 0: all."),
    named("--top-p", type=float, metavar="P", help="Sample from the most likely tokens with total probability P."),
    named("--min-p", type=float, metavar="P", help="Drop tokens less likely than P times the most likely one."),
    named("--seed", type=int, metavar="N", help="Make sampled output reproducible, with any speculator."),
    named("--n", type=int, metavar="N", help="Number of completions for each prompt."),
)
penalty_options = option_group(
    "Penalty and ban",
    named("--repetition-penalty", type=float, metavar="X", help="Divide the logits of tokens seen so far; 1: none."),
    named("--presence-penalty", type=float, metavar="X", help="Subtract from the logits of tokens in the output."),
    named("--frequency-penalty", type=float, metavar="X", help="Subtract once for each occurrence in the output."),
    named("--logit-bias", metavar="JSON", help="Add to the logits of token ids, such as '{\"42\": -5}'."),
    named("--bad-word", metavar="TEXT", multiple=True, help="Never generate this text. Repeatable."),
    named("--allowed-token-id", type=int, metavar="ID", multiple=True, help="Generate only these tokens. Repeatable."),
)
length_options = option_group(
    "Length and stop",
    named("--max-tokens", type=int, metavar="N", help="Maximum number of tokens to generate. [default: 128]"),
    named("--min-tokens", type=int, metavar="N", help="Minimum number of tokens to generate."),
    named("--stop", metavar="TEXT", multiple=True, help="Stop before this text. Repeatable."),
    named("--include-stop", is_flag=True, help="Keep the stop text in the output."),
    named("--stop-token-id", type=int, metavar="ID", multiple=True, help="Stop at this token. Repeatable."),
    named("--ignore-eos", is_flag=True, help="Continue after the end-of-sequence token."),
)
report_options = option_group(
    "Output",
    named("--json", "as_json", is_flag=True, help="Print one JSON object per completion and line."),
    named("--logprobs", type=int, metavar="N", help="With --json: the N most likely tokens at each position; -1: all."),
    named("--prompt-logprobs", type=int, metavar="N", help="The same for the prompt tokens."),
    named("--keep-special-tokens", is_flag=True, help="Keep special tokens in the text."),
    named("--stats", is_flag=True, help="Report speed and acceptance on standard error."),
    named("-q", "--quiet", is_flag=True, help="Hide startup steps and progress."),
)


def read_sampling_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Converts command-line options to keywords of `SamplingParams`; options that were not given are left out.

    Raises:
        ConfigurationError: `--logit-bias` is not a JSON object.
    """
    options = {_NAMES.get(name, name): value for name, value in given.items() if _is_given(value)}
    if options.pop("keep_special_tokens", False):
        options["skip_special_tokens"] = False
    if "logit_bias" in options:
        options["logit_bias"] = parse_json(options["logit_bias"], "--logit-bias")
        if not isinstance(options["logit_bias"], dict):
            raise ConfigurationError(
                '--logit-bias: expected a JSON object of token ids and numbers, such as {"42": -5}'
            )
    return options


def _is_given(value: Any) -> bool:
    return value is not None and value is not False and value != ()


def make_params(*layers: Mapping[str, Any]) -> SamplingParams:
    """Creates sampling parameters from keywords; later layers override earlier ones.

    Raises:
        RequestError: a name is unknown, or a value is invalid.
    """
    import attrs

    from specplug.sampling.params import SamplingParams

    options: dict[str, Any] = {}
    for layer in layers:
        options |= layer
    known = {field.name for field in attrs.fields(SamplingParams)}
    for name in options:
        if name not in known:
            raise RequestError(f"unknown sampling parameter '{name}'{did_you_mean(name, known)}")
    return SamplingParams(**options)
