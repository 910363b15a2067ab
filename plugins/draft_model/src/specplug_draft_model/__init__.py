"""Speculation with a draft model: a second, smaller causal LM drafts for the target."""

from __future__ import annotations

from specplug_draft_model.loading import load_speculator, transformers_options
from specplug_draft_model.settings import DraftModelSettings
from specplug_draft_model.speculator import DraftModelSpeculator

__all__ = ["DraftModelSettings", "DraftModelSpeculator", "load_speculator", "settings_class", "transformers_options"]

settings_class = DraftModelSettings
