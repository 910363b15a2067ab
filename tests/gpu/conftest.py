"""Which tests can run on this machine."""

from __future__ import annotations

import torch

_NEEDS = {"test_cuda.py": 1, "test_two_gpus.py": 2}
collect_ignore = [name for name, gpus in _NEEDS.items() if torch.cuda.device_count() < gpus]
