"""What is made smaller where only it matters that a command works, as on the pages of docs/.

Examples are shuffled among the next 10,000, which are all made before the first step; and a task
file that is read again, as in each new process, spells its 10,000 numbers again.
"""

import functools

import num2words

ASKED = "T5JAX_TESTS_QUICK"
"""A variable, set for processes of `forks` in which it is so too."""
_spell = functools.cache(num2words.num2words)


def replacements() -> list[tuple[object, str, object]]:
    """Returns what is replaced: the owner, the name, and what stands in its place."""
    from t5jax.data.tasks import base

    return [(base, "SHUFFLE_BUFFER", 100), (num2words, "num2words", _spell)]
