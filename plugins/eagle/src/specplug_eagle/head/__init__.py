"""The draft head's mathematics, for drafting and for training alike."""

from __future__ import annotations

from specplug_eagle.head.layers import Attend
from specplug_eagle.head.model import DraftHead, HeadOutput
from specplug_eagle.head.spec import HeadSpec, RopeSpec

__all__ = ["Attend", "DraftHead", "HeadOutput", "HeadSpec", "RopeSpec"]
