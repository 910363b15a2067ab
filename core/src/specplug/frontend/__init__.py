"""What `LLM` and `AsyncLLM` share: from prompts to an engine's requests, and from requests to outputs."""
