"""The bodies of requests, as OpenAI and vLLM define them."""
