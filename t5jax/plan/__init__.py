"""What a config needs and does on a TPU that is not there, from the compiler's text alone."""
