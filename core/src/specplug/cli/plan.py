"""`specplug plan`: what an engine would allocate, from configuration and headers alone."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import click

from specplug.cli.engine_options import engine_options, read_engine_options
from specplug.cli.libraries import check_plugins, import_libraries
from specplug.cli.option_groups import GroupedCommand
from specplug.cli.terminal import Terminal


@click.command(cls=GroupedCommand, short_help="Show what would be allocated, before any weight is read.")
@click.argument("target")
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print one object; its keys are stable.")
def plan(target: str, as_json: bool, **given: Any) -> None:
    """Show the memory plan of an engine for TARGET: a folder, a hub name, or tiny, the model that comes with specplug.

    The plan is made from configuration and file headers alone, and is exactly what the engine then allocates. No weight
    is read; a hub checkpoint that is not here yet is downloaded. The exit status is 1 if the plan does not fit.

    \b
    Examples:
      specplug plan tiny --memory 64MiB
      specplug plan org/model --memory 24GiB --max-model-len 8192 \\
        --speculative-config '{"method": "ngram", "num_speculative_tokens": 5}'
    """  # noqa: D301
    # What can be refused without importing torch is refused first.
    from specplug.config.engine import EngineConfig

    config = EngineConfig.create(target, **read_engine_options(given))
    out = Terminal.out()
    with contextlib.redirect_stdout(sys.stderr):  # standard output gets the plan, whatever a plugin may print
        check_plugins(config)
        import_libraries()
        from specplug.cli.plan_report import PlanReport
        from specplug.engine.planning import plan_engine
        from specplug.text.prompts import LazyTokenizer
        from specplug.tiny import resolve_model

        source = None if config.skip_tokenizer_init else resolve_model(config.tokenizer or target)
        revision = config.revision if config.tokenizer is None else None
        tokenizer = LazyTokenizer(source, revision, trust_remote_code=config.trust_remote_code)
        planned = plan_engine(config, tokenizer=tokenizer)
        try:
            report = PlanReport.of(planned)
        finally:
            planned.facade.close()
    if as_json:
        out.line(json.dumps(report.as_json(), indent=2))
    else:
        report.show(out)
