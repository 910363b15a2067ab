"""Sampling: a request's parameters, the distributions after them, and the random streams."""
