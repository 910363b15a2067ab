"""Automatic draft lengths."""

from specplug.speculation.adaptive.controller import AdaptiveDraftLength
from specplug.speculation.adaptive.settings import AdaptiveSettings

__all__ = ["AdaptiveDraftLength", "AdaptiveSettings"]
