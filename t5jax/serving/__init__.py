"""Serving: an engine with continuous batching, and an HTTP server of OpenAI's interface."""
