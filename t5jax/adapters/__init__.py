"""Adapters: a few trained parameters beside those of a frozen base.

An adapter is a tree of further leaves beside the base's, in the same tree of parameters, so that
networks, sharding, decoding and serving take both at once (`t5jax.models.layers`).
"""
