"""Prompts to ids, ids to text. Does not know engines."""
