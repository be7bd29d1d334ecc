"""Attention and cache-writing kernels, one folder an op, each with a plain-JAX twin."""
