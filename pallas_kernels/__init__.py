"""Attention and cache-writing kernels: one folder per op, each with a plain-JAX twin."""
