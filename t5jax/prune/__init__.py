"""Pruning: weights that are zero, heads and columns that are gone, and vocabularies cut to a use.

- `masks.py` chooses single weights by their magnitude, once or in steps of a run.
- `structured.py` removes whole heads and MLP columns, which gives a smaller network.
- `vocabulary.py` keeps the pieces of a vocabulary that texts need, with their embeddings.

They are functions of a description and parameters; `prune.py` and `trim.py` are the commands, which
read and write folders.
"""

from t5jax.prune.masks import magnitude_masks, prunable, sparsity_of
from t5jax.prune.structured import narrow

__all__ = ["magnitude_masks", "narrow", "prunable", "sparsity_of"]
