"""Recurrent state: what a row keeps beside its KV in convolution, delta-rule and state-space layers."""
