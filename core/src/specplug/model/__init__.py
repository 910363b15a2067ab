"""Running Hugging Face causal LMs over ragged batches with a paged KV cache. Knows nothing about speculation."""
