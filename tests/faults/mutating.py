"""Inputs that someone else has made, mutated at random."""

import contextlib
import copy
import json
import random
from collections.abc import Iterator

DECOY = "decoy-of-the-tests"
"""The name of a file outside of the folder, which inputs name."""

_WEIRD = [
    *(None, True, -1, 0, 1, 2, 10**6, 10**12, 10**40, -(10**9), 0.5, -0.0, 1e308, float("nan")),
    *(
        "",
        "x",
        "0",
        "\ud800",
        "\0",
        "é" * 50,
        f"../{DECOY}",
        f"/{DECOY}",
        "a/b",
        "{{ 1 }}",
        "__class__",
    ),
    *([], [[]], [None], ["a"], [1, 2], {}, {"a": 1}, {"__proto__": []}, [-1], [10**12], [[1, [2]]]),
]


def mutate(content: bytes, choose: random.Random, is_json: bool) -> bytes:
    """Returns an input that differs from a sound one."""
    if is_json and choose.random() < 0.75:
        tree = json.loads(content)
        for _ in range(choose.choice((1, 1, 1, 2, 4))):
            tree = _mutate_tree(tree, choose)
        with contextlib.suppress(ValueError):
            return json.dumps(tree).encode("utf-8", "surrogatepass")
    mutated = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 8))):
        place = choose.randrange(len(mutated) + 1)
        how = choose.randrange(7)
        if how == 0 and mutated:
            mutated[place % len(mutated)] ^= 1 << choose.randrange(8)
        elif how == 1:
            del mutated[place:]
        elif how == 2:
            mutated[place:place] = choose.randbytes(choose.randrange(1, 9))
        elif how == 3:
            mutated[place:place] = mutated[: choose.randrange(len(mutated) + 1)][:2000]
        elif how == 4:
            del mutated[place : place + choose.randrange(1, 40)]
        elif how == 5:
            mutated[place:place] = choose.choice(
                (b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b"\xff\xfe", b"\0" * 9, b"1e999")
            )
        else:
            mutated[place : place + 8] = (10**12).to_bytes(8, "little")
    return bytes(mutated)


def _mutate_tree(tree: object, choose: random.Random) -> object:
    places = list(_places(tree))
    if not places:
        return copy.deepcopy(choose.choice(_WEIRD))
    owner, key = choose.choice(places)
    how = choose.randrange(6)
    if how == 0:
        del owner[key]
    elif how == 1 and isinstance(owner, dict):
        owner[choose.choice(("", "x", str(key) + "s", "name"))] = owner[key]
    elif how == 2:
        owner[key] = [owner[key]]
    else:
        owner[key] = copy.deepcopy(choose.choice(_WEIRD))
    return tree


def _places(tree: object) -> Iterator[tuple]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])
