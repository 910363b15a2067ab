"""Recurrent state: what a row keeps next to its KV in convolution, delta-rule and state-space layers."""
