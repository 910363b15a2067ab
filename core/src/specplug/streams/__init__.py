"""Between the engine's thread and event loops: what is let in, outputs on their way, and when consumers are told of them."""
