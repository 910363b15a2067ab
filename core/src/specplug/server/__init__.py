"""An HTTP server with OpenAI's endpoints, on `AsyncLLM`. Needs `pip install 'specplug[serve]'`."""
