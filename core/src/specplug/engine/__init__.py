"""The engine: requests, scheduling, startup and the step."""
