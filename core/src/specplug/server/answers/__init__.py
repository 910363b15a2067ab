"""From requests to responses: completions, chat completions, tokens."""
