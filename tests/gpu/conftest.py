"""Which tests can run on this machine."""

from __future__ import annotations

import torch

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]
