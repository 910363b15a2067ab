"""The package templates of `specplug new`."""
