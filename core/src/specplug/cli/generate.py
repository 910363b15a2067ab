"""`specplug generate`: text from a target, as it is generated."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from specplug.cli.meter import Meter
from specplug.cli.speculative_option import read_speculative_config
from specplug.cli.startup_view import StartupView
from specplug.cli.terminal import Terminal
from specplug.cli.text_view import TextView

if TYPE_CHECKING:
    from collections.abc import Callable

    from specplug.llm import LLM
    from specplug.sampling.params import SamplingParams


def _options(*options: Callable[..., Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


_sampling_options = _options(
    click.option("--max-tokens", type=int, default=128, show_default=True, help="The most tokens to generate."),
    click.option(
        "--temperature", type=float, default=0.0, show_default=True, help="0 always takes the likeliest token."
    ),
    click.option("--top-k", type=int, default=0, show_default=True, help="Sample from the k likeliest tokens; 0: all."),
    click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from the likeliest share p."),
    click.option("--seed", type=int, help="Makes sampled output repeatable, with any speculator."),
)
_engine_options = _options(
    click.option(
        "--dtype", default="auto", show_default=True, help="float32, bfloat16, ...; auto: the checkpoint's own."
    ),
    click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda or cuda:N; auto: a GPU if there is one."
    ),
    click.option("--memory", metavar="SIZE", help="For weights, caches and buffers together, such as 8GiB."),
    click.option("--max-model-len", type=int, help="The longest sequence, prompt and output."),
    click.option("--revision", help="The target's revision on the hub."),
    click.option("--trust-remote-code", is_flag=True, help="Let code that comes with the target run."),
    click.option("--allow-plugin", metavar="NAME", multiple=True, help="Load only this method or package. Repeatable."),
    click.option(
        "--deny-plugin", metavar="NAME", multiple=True, help="Do not load this method or package. Repeatable."
    ),
    click.option(
        "--strict", is_flag=True, help="Fail when a speculator fails, instead of going on without its drafts."
    ),
)


@click.command(short_help="Generate text with a model, as it comes.")
@click.argument("target")
@click.option("--prompt", metavar="TEXT", required=True, help="What to continue; - reads standard input.")
@click.option("--speculative-config", metavar="JSON|FILE", help="The method and its keys. None: plain decoding.")
@_sampling_options
@_engine_options
@click.option("--stats", is_flag=True, help="Report speed and acceptance on standard error.")
@click.option("-q", "--quiet", is_flag=True, help="Do not show the startup steps.")
def generate(
    target: str,
    prompt: str,
    speculative_config: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    allow_plugin: tuple[str, ...],
    deny_plugin: tuple[str, ...],
    stats: bool,
    quiet: bool,
    **engine_options: Any,
) -> None:
    """Generate text with TARGET: a folder, a hub name, or tiny, the model that comes with specplug.

    The text goes to standard output as it is generated, everything else to standard error. On a terminal, text that a
    speculator drafted and the target accepted is coloured.

    \b
    Examples:
      specplug generate tiny --prompt "import os" --stats
      specplug generate org/model --prompt "Once upon a time" --max-tokens 200 \\
        --speculative-config '{"method": "ngram", "num_speculative_tokens": 5}'
    """  # noqa: D301
    # What can be refused without importing torch is refused first.
    from specplug.configuration.engine import EngineConfig
    from specplug.sampling.params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    options = {
        "speculative_config": read_speculative_config(speculative_config),
        "allowed_plugins": allow_plugin or None,
        "denied_plugins": deny_plugin,
        "max_num_seqs": 1,
        **engine_options,
    }
    EngineConfig.create(target, **options)
    text = sys.stdin.read() if prompt == "-" else prompt

    out, err = Terminal.out(), Terminal.err()
    with contextlib.redirect_stdout(sys.stderr):  # standard output gets the text, whatever a plugin may print
        _run(target, text, params, options, out, err, stats=stats, quiet=quiet)


def _run(
    target: str,
    prompt: str,
    params: SamplingParams,
    options: dict[str, Any],
    out: Terminal,
    err: Terminal,
    *,
    stats: bool,
    quiet: bool,
) -> None:
    with StartupView(err, quiet=quiet) as view:
        view.announce("importing PyTorch")
        from specplug.llm import LLM

        llm = LLM(target, on_step=view, **options)
    with llm:
        shown = TextView(out, [speculator.method for speculator in llm.engine.chain.speculators])
        if shown.legend and not quiet:
            err.paragraph(shown.legend, style="dim")
        meter = Meter()
        try:
            for piece in llm.stream(prompt, params):
                meter.add(piece)
                shown.show(piece)
        finally:
            shown.close()
        if stats:
            _show_stats(err, meter, llm)


def _show_stats(terminal: Terminal, meter: Meter, llm: LLM) -> None:
    metrics = meter.metrics
    assert metrics is not None
    rate = "" if meter.tokens_per_second is None else f", then {meter.tokens_per_second:.1f} tokens/s"
    rows = [
        ("tokens", f"{len(meter.token_ids)} (ended by {meter.finish_reason})"),
        ("speed", f"first token after {meter.seconds_to_first:.3f} s{rate}"),
        ("target steps", f"{metrics.num_steps}"),
    ]
    if metrics.mean_acceptance_length is not None:
        explained = f"tokens per step that verified a draft, in {metrics.num_spec_steps} of {metrics.num_steps} steps"
        rows.append(("acceptance length", f"{metrics.mean_acceptance_length:.2f} {explained}"))
    faults = llm.engine.chain.faults
    for speculator in llm.engine.chain.speculators:
        method = speculator.method
        counts = metrics.by_method.get(method)
        drafted = counts.num_draft_tokens if counts else 0
        accepted = counts.num_accepted_draft_tokens if counts else 0
        share = f" ({accepted / drafted:.0%})" if drafted else ""
        notes = f"; it failed {faults[method]} times" if faults[method] else ""
        if speculator.overrides_verify:
            notes += "; verified by its own rule, which specplug does not check"
        rows.append((method, f"{accepted} accepted of {drafted} drafted{share}{notes}"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        terminal.paragraph(f"{name:<{width}}  {value}", indent=" " * (width + 2))
