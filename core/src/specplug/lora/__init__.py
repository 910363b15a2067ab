"""LoRA adapters: their files, the low-rank layers of a target, and which are loaded."""
