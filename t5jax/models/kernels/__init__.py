"""Kernels for TPU, written in Pallas; each has a reference in plain JAX."""
