"""From a checkpoint to a model that runs: files, weights, architecture, tokenizer, parity probe."""
