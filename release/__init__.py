"""Checks and builds a version: `python -m release v0.2.0`, or `make release TAG=v0.2.0`."""
