"""The command line: `specplug list`, `specplug generate`, `specplug demo`."""
