"""The target's hidden states and top-k probabilities, stored until speculators read them."""
