"""Drafting with a loaded head: chains, static trees, dynamic trees."""
