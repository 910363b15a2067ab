"""Between token ids and text. Knows nothing about engines."""
