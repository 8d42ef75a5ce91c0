"""Caches of tokenized examples: written once, read in any order."""
