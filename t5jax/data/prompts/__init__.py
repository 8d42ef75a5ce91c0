"""Prompted tasks: how a row reads as a prompt and its answer."""
