"""Plans the engine of `specplug plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specplug.cli.views.plan import PlanReport
from specplug.engine.planning import plan_engine
from specplug.text.prompts import LazyTokenizer
from specplug.tiny import resolve_model

if TYPE_CHECKING:
    from specplug.config.engine import EngineConfig


def make_report(config: EngineConfig) -> PlanReport:
    """Plans an engine and returns the report.

    Raises:
        SpecplugError: the plan cannot be made, or does not fit the budget.
    """
    source = None if config.skip_tokenizer_init else resolve_model(config.tokenizer or config.model)
    revision = config.revision if config.tokenizer is None else None
    tokenizer = LazyTokenizer(source, revision, trust_remote_code=config.trust_remote_code)
    planned = plan_engine(config, tokenizer=tokenizer)
    try:
        return PlanReport.of(planned)
    finally:
        planned.facade.close()
