"""`specplug vllm-config`: the arguments with which vLLM runs a speculative configuration."""

from __future__ import annotations

import importlib
import json
import shlex
from typing import Any

import click

from specplug.cli.terminal import Terminal
from specplug.errors import ConfigurationError

ENGINE = "vllm"
MISSING = "the integration with vLLM is not installed: pip install specplug-vllm"


@click.command("vllm-config")
@click.argument("config", metavar="JSON")
@click.option("--adapter", is_flag=True, help="Run the plugin also where vLLM has the method itself.")
@click.option(
    "--worker", is_flag=True, help="Run the plugin with specplug's worker, which delivers target states to it."
)
@click.option("--json", "as_json", is_flag=True, help="Print an object with the arguments of vllm.LLM and the notes.")
def vllm_config(config: str, adapter: bool, worker: bool, as_json: bool) -> None:
    """Print the arguments with which vLLM runs a speculative configuration.

    JSON is specplug's speculative_config. Where vLLM has the method itself (ngram, draft_model, eagle, eagle3, suffix), the
    arguments name that, which is faster; every other method is run by its plugin, through specplug-vllm.

    \b
    Examples:
      specplug vllm-config '{"method": "ngram", "prompt_lookup_max": 4}'
      specplug vllm-config '{"method": "last_seen", "num_speculative_tokens": 5}'
      eval vllm serve MODEL "$(specplug vllm-config '{"method": "suffix"}' --adapter)"
    """  # noqa: D301
    try:
        given = json.loads(config)
    except ValueError as error:
        raise ConfigurationError(f"the speculative configuration is not JSON: {error}") from error
    made = _integration().vllm_arguments(given, adapter=adapter, worker=worker)
    terminal = Terminal.out()
    if as_json:
        terminal.line(json.dumps({"arguments": made.arguments, "notes": made.notes}, indent=2))
        return
    terminal.line(" ".join(shlex.quote(word) for word in made.flags()))
    for note in made.notes:
        click.echo(f"specplug: note: {note}", err=True)


def _integration() -> Any:
    """The module of the integration.

    Raises:
        ConfigurationError: it is not installed, or not for this version of core.
    """
    from specplug.plugins.integrations import find_integrations

    record = next((each for each in find_integrations() if each.name == ENGINE), None)
    if record is None:
        raise ConfigurationError(MISSING)
    if record.status == "failed" or record.reason.startswith("needs specplug"):
        raise ConfigurationError(f"{record.distribution} {record.version} cannot be used: {record.reason}")
    return importlib.import_module(record.module)
