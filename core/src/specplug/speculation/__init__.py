"""Driving speculators: what they see, what they may propose, how it is verified, and what happens when they break."""
