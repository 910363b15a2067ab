"""Suffix decoding: drafts what most often followed the last tokens, in this request or in earlier outputs."""

from __future__ import annotations

from specplug_suffix.settings import SuffixSettings
from specplug_suffix.speculator import SuffixSpeculator, load_speculator

__all__ = ["SuffixSettings", "SuffixSpeculator", "load_speculator", "max_num_speculative_tokens", "settings_class"]

max_num_speculative_tokens = 16
"""The most nodes of a draft with `"auto"`: in repeated text long drafts are accepted."""

settings_class = SuffixSettings
