"""Parameters and batches for small networks of any family, and programs that tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.families import FAST, VARIANTS, family_of
from t5jax import batch as features
from t5jax.config import LossConfig
from t5jax.losses import batch_loss
from t5jax.models import api

LOSS = LossConfig(z_loss=0.01)
LOGITS = jax.jit(api.logits, static_argnums=0)
HIDDEN = jax.jit(api.hidden, static_argnums=0)

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def fast_first(*names: str, also: tuple[str, ...] = ()):
    """Returns a parametrization by variant, of which those outside the fast sets are slow."""
    fast = (*FAST, *also)
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "variant", [name if name in fast else pytest.param(name, marks=slow) for name in names]
    )


def sides(model) -> tuple[str, ...]:
    """Returns which stacks a model has."""
    return {"encoder_decoder": ("encoder", "decoder")}.get(model.kind, (model.kind,))


WITH_LOGITS = tuple(name for name, model in VARIANTS.items() if model.num_outputs)
WRITERS = tuple(name for name, model in VARIANTS.items() if model.kind != "encoder")


def _loss(params, model, batch, dropout_rng=None):
    return batch_loss(model, params, batch, LOSS, dropout_rng=dropout_rng)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(model, params, batch, dropout_rng=None):
    return _loss(params, model, batch, dropout_rng)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, batch, dropout_rng=None):
    return jax.value_and_grad(_loss, has_aux=True)(params, model, batch, dropout_rng)


def path_of(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def random_params(model, seed=0, dtype=None):
    """Parameters all of which matter: norms away from where they begin, biases of T5's attention as
    large as its scores."""
    # Copies, since a step may be given them to overwrite.
    return jax.tree.map(jnp.array, _random_params(model, seed, dtype))


@functools.cache
def _random_params(model, seed, dtype):
    rng = np.random.default_rng(seed)

    def one(path, x):
        name = path_of(path)
        values = rng.standard_normal(x.shape) * (1.5 if "relative_bias" in name else 0.3)
        if name.endswith("scale"):
            values += family_of(model).norms_begin_at
        return values.astype(dtype or x.dtype)

    return jax.tree_util.tree_map_with_path(one, api.param_shapes(model))


def equations(jaxpr, primitive: str, *, repeated=False):
    """Yields the equations of a primitive in a program, and in those inside it, in order.

    Args:
      repeated: what is scanned over is yielded as often as it runs.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                for _ in range(equation.params.get("length", 1) if repeated else 1):
                    yield from equations(inner, primitive, repeated=repeated)


# --- Batches --------------------------------------------------------------------------------------

LENGTH = 26
# Of the examples: tokens of the inputs, and of the targets (or of a text, where there is one).
SIZES = ((24, 25), (11, 14), (13, 10), (4, 2), (26, 26), (9, 5), (2, 8), (5, 9))
ALONE = [[i] for i in range(8)]
TOGETHER = [[2, 1], [0], [3, 5, 7], [4], [6], [], [], []]

Example = dict[str, np.ndarray]


def random_examples(model, sizes=SIZES, seed=0) -> list[Example]:
    """Examples as the model's kind has them, feature to values; nothing is padded.

    Ids of a decoder alone are any, padding's and eos among them. Of an encoder's targets about half
    are asked, or that of the first token alone.
    """
    rng = np.random.default_rng(seed)

    def tokens(size):
        ids = rng.integers(2, model.vocab_size, size).astype("int32")
        return np.where(ids == model.pad_token_id, ids + 1, ids)

    def one(source, target):
        if model.kind == "decoder":
            text = rng.integers(0, model.vocab_size, target + 1).astype("int32")
            text[0] = model.decoder_start_token_id
            example = {
                features.DECODER_INPUT_TOKENS: text[:-1],
                features.DECODER_TARGET_TOKENS: text[1:],
            }
        elif model.kind == "encoder":
            outputs = model.num_outputs or 2
            asked = rng.random(source) < 0.5
            if model.head == "sequence_classification":
                asked = np.arange(source) == 0
            return {
                features.ENCODER_INPUT_TOKENS: tokens(source),
                features.ENCODER_TARGET_TOKENS: rng.integers(0, outputs, source).astype("int32"),
                features.ENCODER_LOSS_WEIGHTS: asked.astype("float32"),
            }
        else:
            targets = tokens(target)
            example = {
                features.ENCODER_INPUT_TOKENS: tokens(source),
                features.DECODER_INPUT_TOKENS: features.shift_right(
                    targets, model.decoder_start_token_id
                ),
                features.DECODER_TARGET_TOKENS: targets,
            }
        return example | {features.DECODER_LOSS_WEIGHTS: np.ones(target, "float32")}

    return [one(*size) for size in sizes]


def pack(model, examples: list[Example], rows: list[list[int]], length=LENGTH) -> dict:
    """Returns a batch whose rows hold the examples that `rows` names, one behind the other."""
    batch = {}
    for name, values in examples[0].items():
        is_input = name == features.ENCODER_INPUT_TOKENS
        fill = model.pad_token_id if is_input else 0
        batch[name] = np.full((len(rows), length), fill, values.dtype)
    for side in {name.split("_")[0] for name in batch}:
        batch |= {f"{side}_{x}": np.zeros((len(rows), length), "int32") for x in _PACKED}
    for row, members in enumerate(rows):
        start = {"encoder": 0, "decoder": 0}
        for segment, member in enumerate(members, 1):
            example = examples[member]
            for side in start:
                own = {name: x for name, x in example.items() if name.startswith(side)}
                if not own:
                    continue
                size = len(next(iter(own.values())))
                span = slice(start[side], start[side] + size)
                own |= {f"{side}_segment_ids": segment, f"{side}_positions": np.arange(size)}
                for name, values in own.items():
                    batch[name][row, span] = values
                start[side] += size
    return batch


_PACKED = ("segment_ids", "positions")


def without_segments(batch) -> dict:
    return {name: x for name, x in batch.items() if not name.endswith(_PACKED)}


def random_batch(model, rows=4, source=9, target=7, seed=0):
    """Rows of different lengths, padded at the end; their loss weights are 1 on target tokens."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(2, model.vocab_size, (rows, source)).astype("int32")
    targets = rng.integers(2, model.vocab_size, (rows, target)).astype("int32")
    for row in range(1, rows):  # The first row is full.
        inputs[row, rng.integers(2, source) :] = 0
        targets[row, rng.integers(2, target) :] = 0
    return {
        features.ENCODER_INPUT_TOKENS: inputs,
        features.DECODER_INPUT_TOKENS: features.shift_right(targets, model.decoder_start_token_id),
        features.DECODER_TARGET_TOKENS: targets,
        features.DECODER_LOSS_WEIGHTS: (targets != 0).astype("float32"),
    }


def is_real(model, batch) -> np.ndarray:
    """Returns bool [B, T]: the places of a padded batch at which an output means something."""
    if model.kind != "encoder":
        return batch[features.DECODER_SEGMENT_IDS] > 0
    real = batch[features.ENCODER_SEGMENT_IDS] > 0
    if model.head in ("sequence_classification", "pooler"):
        real &= np.arange(real.shape[1]) == 0
    return real


def output_sample(model, outputs_BTV, batch) -> np.ndarray:
    """Returns some numbers of each real place of some rows, to be kept in a file."""
    outputs_BTV = np.asarray(outputs_BTV)
    places = [(b, t) for b, t in np.argwhere(is_real(model, batch)) if b in (0, 1, 3)]
    if len(places) == 3:  # One place a row.
        return np.concatenate([outputs_BTV[b, t, :20] for b, t in places])
    return np.array([outputs_BTV[b, t, (7 * t + 3 * b) % outputs_BTV.shape[-1]] for b, t in places])


# --- Comparing ------------------------------------------------------------------------------------


def assert_trees_close(got, expected, *, atol, rtol=1e-5):
    """Compares two trees leaf by leaf, naming the leaf that differs."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_allclose(
            np.asarray(a, "float32"),
            np.asarray(b, "float32"),
            atol=atol,
            rtol=rtol,
            err_msg=path_of(path),
        )


def assert_same(got, expected):
    """Same leaves, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path_of(path)
        np.testing.assert_array_equal(a, b, err_msg=path_of(path))
