"""What a model is made of, and whether it can run here: layers, masks, KV shapes, sizes, lengths."""
