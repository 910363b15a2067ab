"""From a checkpoint to a model that runs: files, weights, tokenizer, parity probe."""
