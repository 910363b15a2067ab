"""Speculation by prompt lookup: what followed the last tokens before is drafted again."""

from __future__ import annotations

from specplug_ngram.speculator import NgramSettings, NgramSpeculator, load_speculator

__all__ = ["NgramSettings", "NgramSpeculator", "load_speculator", "settings_class"]

settings_class = NgramSettings
