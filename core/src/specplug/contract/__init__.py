"""What a plugin author reads: the five hooks, and the types that travel through them."""
