"""T5X's checkpoints: files.py opens them, mapping.py converts them, importing.py writes runs."""
