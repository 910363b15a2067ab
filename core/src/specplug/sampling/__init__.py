"""How tokens are drawn: a request's parameters, the distributions they shape, and the randomness they use."""
