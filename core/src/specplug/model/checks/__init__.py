"""Comparing a model with itself: as it is given to others, and as it is compiled."""
