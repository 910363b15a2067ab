"""Finding, checking and registering plugins."""
