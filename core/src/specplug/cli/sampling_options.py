"""The options of `generate` that say how tokens are chosen: all of `SamplingParams`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specplug.cli.json_text import parse_json
from specplug.cli.option_groups import named, option_group
from specplug.errors import ConfigurationError, RequestError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from specplug.sampling.params import SamplingParams

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
        help="0 always takes the likeliest token. [default: 0, or the model's]",
    ),
    named("--top-k", type=int, metavar="K", help="Sample from the K likeliest tokens; 0: all."),
    named("--top-p", type=float, metavar="P", help="Sample from the likeliest tokens that make up the share P."),
    named("--min-p", type=float, metavar="P", help="Drop tokens below the share P of the likeliest one's probability."),
    named("--seed", type=int, metavar="N", help="Makes sampled output repeatable, with any speculator."),
    named("--n", type=int, metavar="N", help="Completions of each prompt."),
)
penalty_options = option_group(
    "Penalty and ban",
    named("--repetition-penalty", type=float, metavar="X", help="Divides the logits of tokens seen so far; 1: none."),
    named("--presence-penalty", type=float, metavar="X", help="Subtracted from tokens that the output holds."),
    named("--frequency-penalty", type=float, metavar="X", help="Subtracted for every time the output holds them."),
    named("--logit-bias", metavar="JSON", help="Token id to what is added to its logit, such as '{\"42\": -5}'."),
    named("--bad-word", metavar="TEXT", multiple=True, help="A word that is not generated. Repeatable."),
    named("--allowed-token-id", type=int, metavar="ID", multiple=True, help="Generate only these. Repeatable."),
)
length_options = option_group(
    "Length and stop",
    named("--max-tokens", type=int, metavar="N", help="The most tokens to generate. [default: 128]"),
    named("--min-tokens", type=int, metavar="N", help="Do not stop before so many tokens."),
    named("--stop", metavar="TEXT", multiple=True, help="End before this text. Repeatable."),
    named("--include-stop", is_flag=True, help="Keep the text that ended the output."),
    named("--stop-token-id", type=int, metavar="ID", multiple=True, help="End with this token. Repeatable."),
    named("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token."),
)
report_options = option_group(
    "Output",
    named("--json", "as_json", is_flag=True, help="Print one object for each completion, a line each."),
    named("--logprobs", type=int, metavar="N", help="With --json: the N likeliest tokens at each position; -1: all."),
    named("--prompt-logprobs", type=int, metavar="N", help="The same for the tokens of the prompt."),
    named("--keep-special-tokens", is_flag=True, help="Leave special tokens in the text."),
    named("--stats", is_flag=True, help="Report speed and acceptance on standard error."),
    named("-q", "--quiet", is_flag=True, help="Do not show the startup steps and the progress."),
)


def read_sampling_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the command line → keywords of `SamplingParams`; options that were not given are left out.

    Raises:
        ConfigurationError: `--logit-bias` is no JSON object.
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
    """Sampling parameters from keywords; later layers override earlier ones.

    Raises:
        RequestError: a name is unknown, or a value is not one it can have.
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
