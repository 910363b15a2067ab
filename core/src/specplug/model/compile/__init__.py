"""Forwards as machine code and CUDA graphs."""
