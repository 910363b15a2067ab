"""Suffix decoding: what most often followed the last tokens, in this request or in earlier outputs, is drafted."""

from __future__ import annotations

from specplug_suffix.settings import SuffixSettings
from specplug_suffix.speculator import SuffixSpeculator, load_speculator

__all__ = ["SuffixSettings", "SuffixSpeculator", "load_speculator", "max_num_speculative_tokens", "settings_class"]

max_num_speculative_tokens = 16
"""The most nodes of a draft where core chooses their number: repeated text makes long drafts come true."""

settings_class = SuffixSettings
