"""T5X's checkpoints: files.py opens them, mapping.py renames, importing.py makes runs of them."""
