"""The command `specplug`: options in this package, the work in `run`, the output in `views`."""
