"""What runs have done, for people: a list of them, and a page with their curves side by side."""

from t5jax.report.page import render
from t5jax.report.runs import Run, find_runs, read_run, runs_table

__all__ = ["Run", "find_runs", "read_run", "render", "runs_table"]
