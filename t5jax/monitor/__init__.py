"""What a person watches of a run.

Whatever is shown goes to stderr; stdout is left to results that are piped on. clu, TensorFlow,
matplotlib and rich are imported inside functions, so that importing these files costs nothing.
"""
