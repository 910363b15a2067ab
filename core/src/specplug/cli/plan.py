"""`specplug plan`: what an engine would allocate, from configuration and file headers."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import click

from specplug.cli.options import GroupedCommand, engine_options, lora_options, read_engine_options
from specplug.cli.process import check_plugins, import_libraries
from specplug.cli.terminal import Terminal


@click.command(cls=GroupedCommand, short_help="Show the memory plan; no weights are read.")
@click.argument("target")
@engine_options
@lora_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; its keys are stable.")
def plan(target: str, as_json: bool, **given: Any) -> None:
    """Show the memory plan of an engine for TARGET: a folder, a hub name, or tiny, the model that comes with specplug.

    The plan is made from configuration and file headers, and is exactly what the engine then allocates. No weights are
    read; a hub checkpoint that is not in the cache is downloaded. The exit status is 1 if the plan does not fit.

    \b
    Examples:
      specplug plan tiny --memory 64MiB
      specplug plan org/model --memory 24GiB --max-model-len 8192 \\
        --speculative-config '{"method": "ngram", "num_speculative_tokens": 5}'
    """  # noqa: D301
    # Invalid options are refused before the slow import of torch.
    from specplug.config.engine import EngineConfig

    config = EngineConfig.create(target, **read_engine_options(given))
    out = Terminal.out()
    with contextlib.redirect_stdout(sys.stderr):  # plugins may print; standard output gets only the plan
        check_plugins(config)
        import_libraries()
        from specplug.cli.run.plan import make_report

        report = make_report(config)
    if as_json:
        out.line(json.dumps(report.as_json(), indent=2))
    else:
        report.show(out)
