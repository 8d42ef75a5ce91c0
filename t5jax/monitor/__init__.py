"""Progress, metrics, plots and tables of a run.

Everything is shown on stderr; stdout is reserved for results, which may be piped. clu, TensorFlow,
matplotlib and rich are imported inside functions, so that importing these modules is cheap.
"""
