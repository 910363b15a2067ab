"""What `specplug new` writes."""
