"""`specplug bench`: compares speculation methods with plain decoding, and with a peer, on one target in one run."""
