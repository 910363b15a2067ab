"""EAGLE for specplug: draft heads that read the target's hidden states, and draft chains and trees."""

from __future__ import annotations

from specplug_eagle.settings import EagleSettings
from specplug_eagle.speculator import EagleSpeculator, load_speculator

__all__ = ["EagleSettings", "EagleSpeculator", "load_speculator", "settings_class"]

settings_class = EagleSettings
