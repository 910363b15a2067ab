"""Suffix decoding: what most often followed the last tokens, in this request or in earlier outputs, is drafted."""

from __future__ import annotations

from specplug_suffix.settings import SuffixSettings
from specplug_suffix.speculator import SuffixSpeculator, load_speculator

__all__ = ["SuffixSettings", "SuffixSpeculator", "load_speculator"]
