"""Measuring speculation methods beside plain decoding, and beside a peer, on one target in one run."""
