"""What commands run once PyTorch and Transformers may be imported; each module is imported by its command, late."""
