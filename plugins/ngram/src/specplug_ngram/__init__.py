"""Prompt lookup: drafts the tokens that followed an earlier occurrence of the last tokens."""

from __future__ import annotations

from specplug_ngram.speculator import NgramSettings, NgramSpeculator, load_speculator, transformers_options

__all__ = ["NgramSettings", "NgramSpeculator", "load_speculator", "settings_class", "transformers_options"]

settings_class = NgramSettings
