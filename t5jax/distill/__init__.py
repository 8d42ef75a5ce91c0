"""Distillation: the teacher of a run (`teacher.py`), and a folder of what it said (`cache.py`)."""
