"""T5X's checkpoints as runs: every form and layout, made here as T5X makes them, and a real one."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import serialization

from command_line import fails, run
from conformance.cases import LOGITS, assert_trees_close, random_batch
from conformance.cases import random_params as random_params_of
from conformance.families import T5, T5_EVEN
from t5jax import checkpoint, sharding, trees
from t5jax.architectures import T5Config, published
from t5jax.config import AxisRules, Config, LossConfig, MeshConfig, OptimizerConfig
from t5jax.convert import export_model
from t5jax.hf import io as hf_io
from t5jax.losses import batch_loss
from t5jax.models import api
from t5jax.optimizers import make_optimizer
from t5jax.source import find
from t5jax.t5x import files, gin, mapping
from t5jax.t5x.importing import import_t5x, is_t5x
from t5jax.train import train
from t5jax.train_state import train_state_shapes
from t5jax.train_step import make_train_step
from tiny import (  # noqa: F401
    TINY,
    eight_devices,
    make_config,
    one_device,
)

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"
REAL = DATA / "checkpoints/t5x_test_t5_tiny.checkpoint_0"
SPIECE = DATA / "vocab/t5_spiece.model"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not here")

# T5X's own networks have 128 as the largest distance.
SMALL = dataclasses.replace(
    T5, vocab_size=384, relative_attention_max_distance=128, dropout_rate=0.1
)
T5_1_0 = dataclasses.replace(
    SMALL, mlp_activation="relu", tie_word_embeddings=True, scale_decoder_outputs=True
)
UMT5 = dataclasses.replace(SMALL, per_layer_relative_bias=True, num_decoder_layers=3)
# Wide enough to be factored. Of the two kinds of attention's kernels in T5X's first network, rows
# are once the width and once the heads.
WIDE = dataclasses.replace(
    SMALL, vocab_size=390, d_model=136, d_ff=132, num_heads=3, d_kv=43, num_decoder_layers=1
)


random_params = functools.cache(random_params_of)
# What `t5jax import` is told of most checkpoints here.
GIVEN = {"vocabulary": "bytes", "mlp_activation": "gated-gelu"}


# --- Checkpoints as T5X writes them ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    scanned: bool = False
    joined: bool = True


FIRST, SCALABLE = Layout(), Layout(scanned=True, joined=False)
UNROLLED = Layout(joined=False)  # The scalable network without its scan.

NAMES = {
    "lm_head": "decoder/logits_dense",
    "encoder/final_norm": "encoder/encoder_norm",
    "decoder/final_norm": "decoder/decoder_norm",
    "pre_attention_norm": "pre_attention_layer_norm",
    "pre_self_attention_norm": "pre_self_attention_layer_norm",
    "pre_cross_attention_norm": "pre_cross_attention_layer_norm",
    "pre_mlp_norm": "pre_mlp_layer_norm",
    "cross_attention/": "encoder_decoder_attention/",
    "relative_bias/embedding": "relpos_bias/rel_embedding",
}


def to_t5x(tree, layout) -> dict[str, np.ndarray]:
    """Returns our parameters, or what is shaped like them, as T5X's: path to array."""
    theirs = {}
    for path, x in trees.flatten(tree).items():
        x = np.asarray(x)
        name = path
        for ours, other in NAMES.items():
            name = name.replace(ours, other)
        if "attention" in path and "kernel" in path and layout.joined:
            layers, *shape = x.shape
            x = (
                x.reshape(layers, -1, shape[2])
                if "out" in path
                else x.reshape(layers, shape[0], -1)
            )
        stack = path.split("/")[0]
        if "/layers/" not in path:
            theirs[name] = x
        elif layout.scanned:
            theirs[name.replace("layers", stack)] = np.moveaxis(x, 0, 1)
        else:
            theirs |= {
                name.replace("/layers/", f"/layers_{i}/"): layer for i, layer in enumerate(x)
            }
    return theirs


def train_state(params, states=None, step=7) -> dict:
    """Returns T5X's train state: nested dicts of arrays."""
    flat = {f"target/{name}": x for name, x in params.items()}
    for name, slots in (states or {}).items():
        flat |= {f"state/param_states/{name}/{slot}": x for slot, x in slots.items()}
    flat["state/step"] = np.int32(step)
    return trees.unflatten(flat)


def write_zarr(folder: Path, x: np.ndarray, chunks=None) -> None:
    store = tensorstore.open(
        {
            "driver": "zarr",
            "dtype": x.dtype.name,
            "kvstore": {"driver": "file", "path": str(folder)},
            "metadata": {
                "compressor": {"id": "gzip"},
                "shape": x.shape,
                "chunks": chunks or [-(-size // 2) for size in x.shape],
            },
        },
        create=True,
    ).result()
    store.write(x).result()


def write(folder: Path, state: dict, form: str) -> Path:
    """Writes a train state in one of the forms there are; returns the checkpoint's path."""
    path = folder / f"checkpoint_{int(state['state']['step'])}"
    if form == "file":
        path.write_bytes(serialization.to_bytes({"version": 3, "optimizer": state}))
        return path
    if form in ("ocdbt", "orbax"):
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=form == "ocdbt")
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path.absolute() / "state", args=ocp.args.PyTreeSave(state))
        return path

    def refer(name, x):
        name = "/".join(key.key for key in name).replace("/", ".")
        if np.ndim(x) < 2:
            return x
        write_zarr(path / name, x)
        return {
            "references": {  # Of T5X's own writer; "gfile" is Google's file system.
                "driver": "zarr",
                "dtype": x.dtype.name,
                "kvstore": {"driver": "gfile", "path": f"{name}/"},
                "metadata": {"shape": list(x.shape), "compressor": {"id": "gzip", "level": 1}},
            },
            "placeholders": f"PLACEHOLDER://{name}",
        }[form]

    path.mkdir()
    if form != "folder":
        state = jax.tree_util.tree_map_with_path(refer, state)
    wrapped = state if form == "placeholders" else {"version": 3, "optimizer": state}
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(wrapped))
    return path


FORMS = ["file", "folder", "references", "placeholders", "orbax", "ocdbt"]


def read(path, activation=None):
    tensors = files.open_tensors(path)
    config = mapping.describe(tensors, str(path), activation)
    return config, mapping.load_params(tensors, config, str(path))


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


# --- Parameters -----------------------------------------------------------------------------------

MODELS = {
    "1.0": (T5_1_0, FIRST),
    "1.1": (SMALL, FIRST),
    "1.1 unrolled": (UMT5, UNROLLED),
    "1.1 scanned": (UMT5, SCALABLE),
    "1.0 scanned, joined, one bias a stack": (T5_1_0, Layout(scanned=True)),
}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "references") for name in MODELS),
        *(("1.1 scanned", form) for form in FORMS if form != "references"),
    ],
)
def test_every_bit_of_the_parameters_and_every_size(name, form, tmp_path):
    config, layout = MODELS[name]
    params = random_params(config)
    path = write(tmp_path, train_state(to_t5x(params, layout)), form)
    activation = None if config.mlp_activation == "relu" else config.mlp_activation
    found, loaded = read(path, activation)
    assert found == config
    assert_same(loaded, params)


def test_large_arrays_are_in_parts_in_msgpack(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    params = random_params(SMALL)
    path = write(tmp_path, train_state(to_t5x(params, FIRST)), "file")
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    assert_same(read(path, "gated-gelu")[1], params)


@pytest.mark.parametrize("form", ["file", "references", "ocdbt"])
def test_bfloat16_is_widened_exactly(form, tmp_path):
    params = random_params(SMALL)
    narrow = {k: x.astype(ml_dtypes.bfloat16) for k, x in to_t5x(params, FIRST).items()}
    _, loaded = read(write(tmp_path, train_state(narrow), form), "gated-gelu")
    expected = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
    assert_same(loaded, expected)


@pytest.mark.usefixtures("eight_devices")
def test_slices_go_straight_to_their_devices(tmp_path):
    config = dataclasses.replace(T5_EVEN, per_layer_relative_bias=True)
    config = dataclasses.replace(config, relative_attention_max_distance=128, dropout_rate=0.1)
    params = random_params(config)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, model=2))
    rules = AxisRules(head_dim="model", heads=None)
    places = sharding.param_shardings(api.param_axes(config), api.param_shapes(config), mesh, rules)
    for layout in (FIRST, SCALABLE):
        folder = tmp_path / str(layout.scanned)
        folder.mkdir()
        path = write(folder, train_state(to_t5x(params, layout)), "references")
        loaded = mapping.load_params(files.open_tensors(path), config, str(path), places)
        assert_same(loaded, params)
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, places)
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("size", ["t5_base", "t5_1_1_small", "mt5_xl", "umt5_base", "ul2"])
def test_a_published_size_is_found_by_its_shapes(size):
    config = published(size)
    layout = SCALABLE if config.per_layer_relative_bias else FIRST
    shapes = jax.tree.map(lambda x: np.broadcast_to(np.int8(0), x.shape), api.param_shapes(config))
    tensors = {
        f"target/{name}": files._Array(x, "")
        for name, x in to_t5x(shapes, layout).items()
        if "layers_1" not in name or "mlp" in name  # To reshape them takes time.
    }
    assert mapping.describe(tensors, "x") == config
    rows = {row.ours for row in (p.row() for p in mapping._table(config, mapping._layout(tensors)))}
    assert rows == set(trees.flatten(api.param_shapes(config)))


# --- Adafactor ------------------------------------------------------------------------------------


class T5XAdafactor:
    """T5X's Adafactor of one array of T5X's, in float32 and in its own words.

    An array of two axes is factored if both have 128 entries or more; the shorter one, or the
    first, is the rows. One of more axes, of which "l" are layers apart, is factored as d against
    the rest.
    """

    def __init__(self, axes: str, shape, *, factored=True, b1=None):
        axes = axes.split()
        self.b1, self.means = b1, tuple(i for i, a in enumerate(axes) if a != "l")
        self.rows = self.columns = None
        if factored and len(axes) == 2 and "l" not in axes and min(shape) >= 128:
            row = 0 if shape[0] <= shape[1] else 1
            self.rows, self.columns = (row,), (1 - row,)
        elif factored and len(axes) > 2 and "n" not in axes:
            self.rows = tuple(i for i, a in enumerate(axes) if a == "d")
            self.columns = tuple(i for i, a in enumerate(axes) if a not in "ld")
        one = np.zeros(1, "float32")
        self.slots = {"v_row": one, "v_col": one, "v": one, "m": one}
        if self.rows:
            self.slots["v_row"] = np.zeros(np.delete(shape, self.columns), "float32")
            self.slots["v_col"] = np.zeros(np.delete(shape, self.rows), "float32")
        else:
            self.slots["v"] = np.zeros(shape, "float32")
        if b1:
            self.slots["m"] = np.zeros(shape, "float32")

    def step(self, n, p, g, rate):
        """Returns the parameter after update n, counted from 0."""
        keep = np.float32(1 - (n + 1.0) ** -0.8)
        g2 = g * g + np.float32(1e-30)
        mean = {"v": g2}
        if self.rows:
            mean = {"v_row": g2.mean(self.columns), "v_col": g2.mean(self.rows)}
        for slot, x in mean.items():
            self.slots[slot] = keep * self.slots[slot] + (1 - keep) * x
        if self.rows:
            row = np.expand_dims(self.slots["v_row"], self.columns)
            row = row / row.mean(self.rows, keepdims=True)
            u = g / np.sqrt(row) / np.sqrt(np.expand_dims(self.slots["v_col"], self.rows))
        else:
            u = g / np.sqrt(self.slots["v"])

        def rms(x):
            return np.sqrt((x * x).mean(self.means, keepdims=True))

        u = np.float32(rate) * np.maximum(rms(p), 1e-3) * u / np.maximum(1, rms(u))
        if self.b1:
            u = self.slots["m"] = (
                np.float32(self.b1) * self.slots["m"] + np.float32(1 - self.b1) * u
            )
        return p - u


def axes_of(name: str, layout: Layout) -> str:
    """Returns T5X's axes of a parameter."""
    heads = "hk" if layout.joined else "h k"
    last_two = "/".join(name.split("/")[-2:])
    axes = {
        "token_embedder/embedding": "v d",
        "logits_dense/kernel": "d v",
        "relpos_bias/rel_embedding": "h n",
        "out/kernel": f"{heads} d",
        "wi/kernel": "d f",
        "wi_0/kernel": "d f",
        "wi_1/kernel": "d f",
        "wo/kernel": "f d",
    }.get(last_two, "d" if last_two.endswith("scale") else f"d {heads}")
    if "encoder/encoder/" in name or "decoder/decoder/" in name:
        first, *rest = axes.split()
        axes = " ".join((first, "l", *rest))
    return axes


RATE = 0.03


def trained_t5x(config, layout, steps=3, tokens=1, **options):
    """Returns T5X's parameters and Adafactors after some steps, and makes gradients.

    Args:
      tokens: that T5X sums over, where our gradients are means.
    """
    ours = random_params(config)
    params = to_t5x(ours, layout)
    adafactors = {
        name: T5XAdafactor(axes_of(name, layout), x.shape, **options) for name, x in params.items()
    }
    rng = np.random.default_rng(1)

    def gradients():
        scale = 10.0 ** rng.uniform(-4, 0)
        grads = jax.tree.map(
            lambda x: (scale * rng.standard_normal(x.shape)).astype("float32"), ours
        )
        return grads, {k: np.float32(tokens) * g for k, g in to_t5x(grads, layout).items()}

    for n in range(steps):
        _, grads = gradients()
        params = {k: adafactors[k].step(n, p, grads[k], RATE) for k, p in params.items()}
    return params, adafactors, gradients


def restore(run_dir):
    """Returns the description, the optimizer and the state of an imported run."""
    last = checkpoint.latest_checkpoint(run_dir)
    config = checkpoint.read_config(last)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=RATE)
    tx = make_optimizer(optimizer, 100, api.param_axes(config.model))
    shapes = train_state_shapes(config.model, tx)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: here, shapes)
    with checkpoint.Checkpoints(run_dir) as checkpoints:
        state = checkpoints.restore(last, shapes, places)
    return config, tx, state


CASES = {
    "1.1": (WIDE, FIRST, "file", None),
    "1.1, more heads than width": (dataclasses.replace(WIDE, d_kv=50), FIRST, "references", 0.9),
    "1.0, as many": (
        dataclasses.replace(
            T5_1_0, d_model=128, num_heads=4, d_kv=32, d_ff=140, num_decoder_layers=1
        ),
        FIRST,
        "placeholders",
        None,
    ),
    "unrolled": (dataclasses.replace(WIDE, per_layer_relative_bias=True), UNROLLED, "orbax", None),
    "scanned": (dataclasses.replace(WIDE, per_layer_relative_bias=True), SCALABLE, "ocdbt", 0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_adafactor_goes_on_as_t5xs_would(case, tmp_path):
    config, layout, form, b1 = CASES[case]
    tokens = 512 if b1 else 1
    params, adafactors, gradients = trained_t5x(config, layout, tokens=tokens, b1=b1)
    assert {bool(a.rows) for a in adafactors.values()} == {False, True}
    states = {name: dict(a.slots) for name, a in adafactors.items()}
    path = write(tmp_path, train_state(params, states, step=3), form)
    activation = None if config.mlp_activation == "relu" else config.mlp_activation
    notes = import_t5x(
        str(path),
        str(tmp_path / "run"),
        vocabulary="bytes",
        mlp_activation=activation,
        loss_tokens=tokens,
    )
    assert "goes on from step 3" in notes[-1], "every statistic is carried"

    saved, tx, state = restore(tmp_path / "run")
    assert saved.model == config
    assert saved.optimizer == OptimizerConfig(b1=b1)
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
    assert [int(state.step), *map(int, counts)] == [3] * (len(counts) + 1)
    assert len(counts) >= 3
    assert_statistics_are_theirs(state, adafactors, layout, tokens)

    ours, theirs = gradients()
    updates, _ = jax.jit(tx.update)(ours, state.opt_state, state.params)
    after = to_t5x(optax.apply_updates(state.params, updates), layout)
    for name, p in params.items():
        expected = adafactors[name].step(3, p, theirs[name], RATE)
        moved = np.abs(expected - p).max()
        assert moved > 1e-6
        assert np.abs(after[name] - expected).max() < 1e-4 * moved, name


def assert_statistics_are_theirs(state, adafactors, layout, tokens):
    """Compares, bit for bit, some statistics of each kind, picked by hand.

    The square of tokens is a power of two: to divide by it is exact.
    """
    means, theirs = state.opt_state.inner[1], {k: a.slots for k, a in adafactors.items()}

    def ours(slot, path):
        leaf = getattr(means, slot)
        for key in path.split("/"):
            leaf = leaf[key]
        return np.asarray(leaf) * np.float32(tokens) ** 2

    def layer(name, slot, axis=0, number=1):
        if layout.scanned:
            return np.take(theirs[name.replace("layers_1", "encoder")][slot], number, axis)
        return theirs[name][slot]

    embedding = theirs["token_embedder/embedding"]
    np.testing.assert_array_equal(ours("v_row", "token_embedder/embedding"), embedding["v_row"])
    np.testing.assert_array_equal(ours("v_col", "token_embedder/embedding"), embedding["v_col"])
    bias = ours("v", "encoder/layers/relative_bias/embedding") if not layout.joined else None
    if bias is not None:
        expected = layer("encoder/layers_1/relpos_bias/rel_embedding", "v", axis=1)
        np.testing.assert_array_equal(bias[1], expected)
    norm = ours("v", "encoder/layers/pre_mlp_norm/scale")[1]
    np.testing.assert_array_equal(
        norm, layer("encoder/layers_1/pre_mlp_layer_norm/scale", "v", axis=1)
    )
    query, name = "encoder/layers/attention/query/kernel", "encoder/layers_1/attention/query/kernel"
    width = ours("v_row", query)[1].size
    heads = ours("v_col", query)[1]
    if layout.joined:  # The shorter side is the rows.
        slots = ("v_row", "v_col") if width <= heads.size else ("v_col", "v_row")
    else:
        slots = ("v_row", "v_col")
    np.testing.assert_array_equal(ours("v_row", query)[1], layer(name, slots[0], axis=1))
    np.testing.assert_array_equal(heads.ravel(), layer(name, slots[1], axis=0).ravel())
    if hasattr(state.opt_state.inner[-1], "ema"):
        (momentum,) = (part.ema for part in state.opt_state.inner if hasattr(part, "ema"))
        np.testing.assert_array_equal(momentum["token_embedder"]["embedding"], -embedding["m"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FIRST, SCALABLE], ids=["first", "scalable"])
def test_whole_statistics_become_the_factors_they_would_have_been(layout, tmp_path):
    """As UMT5-XXL was trained: factored = False."""
    config = dataclasses.replace(WIDE, per_layer_relative_bias=layout.scanned)
    params, whole, _ = trained_t5x(config, layout, factored=False)
    _, factored, _ = trained_t5x(config, layout)  # From the same gradients.
    imported = {}
    for name, adafactors in (("whole", whole), ("factored", factored)):
        (tmp_path / name).mkdir()
        states = {k: dict(a.slots) for k, a in adafactors.items()}
        path = write(tmp_path / name, train_state(params, states), "file")
        out = tmp_path / name / "run"
        notes = import_t5x(str(path), str(out), **GIVEN, loss_tokens=1)
        assert "goes on" in notes[-1]
        imported[name] = restore(out)[2].opt_state
    assert_trees_close(imported["whole"], imported["factored"], atol=0, rtol=1e-5)


def test_statistics_that_do_not_fit_begin_anew_and_are_named(tmp_path):
    """T5X factors stacked kernels of any width; ours are factored from 128."""
    params, adafactors, _ = trained_t5x(UMT5, SCALABLE)
    states = {name: dict(a.slots) for name, a in adafactors.items()}
    del states["encoder/encoder_norm/scale"]
    path = write(tmp_path, train_state(params, states), "file")
    *_, lost = import_t5x(str(path), str(tmp_path / "run"), **GIVEN, loss_tokens=1)
    kernels = [name for name, a in adafactors.items() if a.rows]
    assert lost.startswith(f"Adafactor's statistics of {len(kernels) + 1} parameters begin anew")
    assert all(name in lost for name in (*kernels, "encoder/encoder_norm/scale"))
    _, _, state = restore(tmp_path / "run")
    v = state.opt_state.inner[1].v
    assert not np.any(v["encoder"]["layers"]["mlp"]["wo"]["kernel"])
    assert not np.any(v["encoder"]["final_norm"]["scale"])
    np.testing.assert_array_equal(
        v["decoder"]["final_norm"]["scale"], adafactors["decoder/decoder_norm/scale"].slots["v"]
    )


@pytest.mark.parametrize("optimizer", ["none", "adam", "adafactor"])
def test_parameters_alone(optimizer, tmp_path):
    params = random_params(SMALL)
    theirs = to_t5x(params, FIRST)
    one = np.ones(1, "float32")
    states = {
        "none": {},
        "adam": {"0/mu/encoder": {"x": one}},
        "adafactor": {name: {"v_row": one, "v_col": one, "v": x} for name, x in theirs.items()},
    }[optimizer]
    path = write(tmp_path, train_state(theirs, states), "file")
    out = str(tmp_path / "run")
    *_, note = import_t5x(str(path), out, **GIVEN)
    if optimizer == "adafactor":
        assert note.startswith("Adafactor's state was left behind; to go on with it, import with")
    else:
        assert note == "no state of Adafactor's is in the checkpoint"
        with pytest.raises(ValueError, match="is 9, but .* has no state of Adafactor's to go on"):
            import_t5x(str(path), str(tmp_path / "other"), **GIVEN, loss_tokens=9)
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "0"
    assert_same(find(out).read()[1], params)
    with pytest.raises(ValueError, match="holds imported parameters, with no training to go on"):
        train(make_config(out))


# --- Going on -------------------------------------------------------------------------------------

ADAFACTOR = OptimizerConfig(learning_rate=RATE, schedule="inverse_sqrt", warmup_steps=2)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run made of a T5X checkpoint of step 1000, and the state in memory it was made from."""
    folder = tmp_path_factory.mktemp("t5x")
    config = dataclasses.replace(TINY.model, scan_layers=True)
    params, adafactors, _ = trained_t5x(config, FIRST)
    states = {name: dict(a.slots) for name, a in adafactors.items()}
    path = write(folder, train_state(params, states, step=1000), "references")
    import_t5x(str(path), str(folder / "run"), **GIVEN, loss_tokens=100)
    return folder / "run"


def going_on(run_dir, steps, **changes):
    """Returns a config that says nothing of the model, which the run has."""
    config = make_config(
        run_dir,
        train={"steps": steps, "seed": 5},
        eval={"every": 0},
        data={"batch_size": 4},
    )
    changes = {"model": T5Config(scan_layers=False), "optimizer": ADAFACTOR} | changes
    return dataclasses.replace(config, **changes)


@pytest.mark.slow
def test_training_goes_on_at_t5xs_step(imported, tmp_path):
    from t5jax.data import pipeline, registry

    run_dir = shutil.copytree(imported, tmp_path / "run")
    saved, _, state = restore(run_dir)

    # In memory, two steps from the imported state, on the data from their beginning.
    config = dataclasses.replace(going_on(run_dir, 1002), model=saved.model)
    model = dataclasses.replace(saved.model, scan_layers=False)
    tx = make_optimizer(ADAFACTOR, 1002, api.param_axes(model))
    registry.load_tasks(config.data.task_files)
    batches = pipeline.train_iterator(config)
    step = jax.jit(make_train_step(model, tx, config.loss, seed=5))
    for _ in range(2):
        state, _ = step(state, next(batches))

    train(going_on(run_dir, 1001))
    assert json.loads((run_dir / "t5jax_config.json").read_text())["model"]["d_ff"] == 32
    train(going_on(run_dir, 1002))  # Started again, as after a stop.
    assert_same(restore(run_dir)[2], state)
    # The rate is the schedule's at T5X's steps.
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
    np.testing.assert_allclose(rates[-1], RATE / np.sqrt(1001), rtol=1e-6)


def test_what_does_not_go_on(imported):
    with pytest.raises(ValueError, match="optimizer.name was 'adafactor' and is 'adamw'; set"):
        train(going_on(imported, 1002, optimizer=OptimizerConfig(name="adamw")))
    with pytest.raises(ValueError, match=r"model.d_ff is 48, in .*1000 it is 32"):
        train(going_on(imported, 1002, model=T5Config(d_ff=48)))


def test_an_import_over_a_run_or_without_a_tokenizer(imported, tmp_path):
    path = write(tmp_path, train_state(to_t5x(random_params(SMALL), FIRST)), "file")
    with pytest.raises(ValueError, match="holds a run already; choose another folder"):
        import_t5x(str(path), str(imported), vocabulary="bytes")
    with pytest.raises(ValueError, match="is a T5X checkpoint, which has no tokenizer; give --voc"):
        import_t5x(str(path), str(tmp_path / "run"), vocabulary="")
    with pytest.raises(ValueError, match=r"no tokenizer 'absent.model'; expected \"bytes\""):
        import_t5x(str(path), str(tmp_path / "run"), vocabulary="absent.model")
    with pytest.raises(ValueError, match="--loss-tokens is -1; it must be above 0"):
        import_t5x(str(path), str(tmp_path / "run"), **GIVEN, loss_tokens=-1)
    narrow = dataclasses.replace(SMALL, vocab_size=100)
    (tmp_path / "narrow").mkdir()
    path = write(tmp_path / "narrow", train_state(to_t5x(random_params(narrow), FIRST)), "file")
    with pytest.raises(ValueError, match=r"has 384 ids, but .* has 100; give the one that it was"):
        import_t5x(str(path), str(tmp_path / "run"), **GIVEN)
    assert not (tmp_path / "run").exists()


# --- Bad input ------------------------------------------------------------------------------------


def damaged(tmp_path, change, form="file", config=SMALL, layout=FIRST):
    """Returns a checkpoint whose parameters are as `change` leaves them."""
    theirs = to_t5x(random_params(config), layout)
    change(theirs)
    return write(tmp_path, train_state(theirs), form)


def test_all_that_is_missing_unexpected_and_mis_shaped_is_listed(tmp_path):
    def change(theirs):
        for layer in (0, 1):
            del theirs[f"decoder/layers_{layer}/self_attention/out/kernel"]
        del theirs["encoder/encoder_norm/scale"]
        theirs["encoder/layers_0/mlp/wi_2/kernel"] = np.ones((12, 20), "float32")
        theirs["decoder/layers_1/mlp/wo/kernel"] = np.ones((12, 20), "float32")
        theirs["encoder/layers_1/attention/key/kernel"] = np.ones((12, 15), "int32")

    with pytest.raises(ValueError, match="does not hold the model that was described") as caught:
        read(damaged(tmp_path, change), "gated-gelu")
    message = str(caught.value)
    for part in (
        "missing: target/encoder/encoder_norm/scale [12], "
        "target/decoder/layers_{0-1}/self_attention/out/kernel [15, 12];",
        "unexpected: target/encoder/layers_{0}/mlp/wi_2/kernel [12, 20];",
        "target/decoder/layers_{1}/mlp/wo/kernel [12, 20], expected [20, 12];",
        "not of floats: target/encoder/layers_{1}/attention/key/kernel int32",
    ):
        assert part in message, message


def test_a_list_of_arrays_that_is_damaged(tmp_path):
    path = damaged(tmp_path, lambda theirs: None, "ocdbt")
    for content in ("", "{}", '{"tree_metadata": {"a": {"key_metadata": 3}}}'):
        (path / "state/_METADATA").write_text(content)
        with pytest.raises(ValueError, match="_METADATA is not a list of arrays as Orbax writes"):
            read(path)


def test_an_embedding_that_is_no_matrix(tmp_path):
    def change(theirs):
        theirs["token_embedder/embedding"] = np.ones(9, "float32")

    with pytest.raises(ValueError, match=r"token_embedder/embedding is \[9\]; expected a matrix"):
        read(damaged(tmp_path, change))


def test_a_layer_in_the_middle_is_missed(tmp_path):
    deep = dataclasses.replace(SMALL, num_encoder_layers=3)

    def change(theirs):
        for name in [name for name in theirs if "encoder/layers_1/" in name]:
            del theirs[name]

    with pytest.raises(ValueError, match=r"missing: target/encoder/layers_\{1\}/pre_attention"):
        read(damaged(tmp_path, change, config=deep), "gated-gelu")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("decoder", r"there is no token_embedder/embedding among its \d+ parameters \(decoder/"),
        ("encoder|token", r"there is no decoder/layers_0/mlp/wo/kernel among"),
    ],
)
def test_another_network_of_t5xs(kept, message, tmp_path):
    def change(theirs):
        for name in [name for name in theirs if not re.match(kept, name)]:
            del theirs[name]

    with pytest.raises(ValueError, match=f"holds no encoder-decoder of T5X's: {message}"):
        read(damaged(tmp_path, change))


def test_heads_that_do_not_divide_the_kernel(tmp_path):
    def change(theirs):
        theirs["encoder/relpos_bias/rel_embedding"] = np.ones((4, 8), "float32")

    with pytest.raises(ValueError, match="is 15 wide, which the 4 heads of encoder/relpos_bias"):
        read(damaged(tmp_path, change))


def test_an_activation_that_nothing_tells_and_one_that_cannot_be(tmp_path):
    path = damaged(tmp_path, lambda theirs: None)
    with pytest.raises(ValueError, match=r"give --mlp-activation gated-gelu or gated-silu"):
        read(path)
    assert read(path, "gated-silu")[0].mlp_activation == "gated-silu"
    with pytest.raises(ValueError, match=r"is relu, but the MLP of .* is gated; expected gated-g"):
        read(path, "relu")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("network.T5Config.mlp_activations = ('silu', 'linear')", "gated-silu"),
        ("network.T5Config.mlp_activations = \\\n    ('swish', 'linear')", "gated-silu"),
        ('t5x.examples.t5.network.T5Config.mlp_activations = ("gelu", "linear")', "gated-gelu"),
        ("network.T5Config.mlp_activations = ('relu',)", "relu"),
        ("# network.T5Config.mlp_activations = ('relu',)\n", None),
        ("network.T5Config.mlp_dim = 5", None),
    ],
)
def test_a_config_of_gin_beside_it_tells_the_activation(line, expected, tmp_path):
    text = f"# Macros:\nDROPOUT_RATE = 0.0\n{line}\nnetwork.T5Config.num_heads = 2\n"
    (tmp_path / "config.gin").write_text(text)
    assert gin.activation(tmp_path / "checkpoint_3") == expected
    assert gin.activation(tmp_path / "elsewhere" / "checkpoint_3") is None


def test_an_activation_of_gin_that_is_not_implemented_and_one_that_is(tmp_path):
    path = damaged(tmp_path, lambda theirs: None)
    out = str(tmp_path / "run")
    binding = "network.T5Config.mlp_activations = ('{}', 'linear')\n"
    (path.parent / "config.gin").write_text(binding.format("tanh"))
    with pytest.raises(ValueError, match=r"mlp_activations are \('tanh', 'linear'\), which is not"):
        import_t5x(str(path), out, vocabulary="bytes")
    (path.parent / "config.gin").write_text(binding.format("silu"))
    import_t5x(str(path), out, vocabulary="bytes")
    assert find(out).model.mlp_activation == "gated-silu"


@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_a_truncated_file(share, tmp_path):
    path = damaged(tmp_path, lambda theirs: None)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"not a whole msgpack file .*bytes are here; if it is on"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a whole msgpack file of T5X's"),
        (
            b"{'a': 1}\n",
            "is not a whole msgpack file of T5X's .* a Hugging Face model give the",
        ),
        (b"\xc0", "holds a NoneType; expected T5X's train state"),
        (
            b"\x81\xa1a\x01",
            r"not a checkpoint of T5X's: expected .* below target/, found a",
        ),
        (b'model_checkpoint_path: "model.ckpt-0"', "belongs to a TensorFlow checkpoint"),
    ],
    ids=["empty", "text", "nothing", "another dict", "TensorFlow"],
)
def test_files_of_others(content, message, tmp_path):
    (tmp_path / "checkpoint").write_bytes(content)
    for path in (tmp_path / "checkpoint", tmp_path):
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize("form", ["references", "placeholders", "orbax"])
def test_arrays_that_are_not_there(form, tmp_path):
    path = damaged(tmp_path, lambda theirs: None, form)
    path = path / "state" if form == "orbax" else path
    # Without its head the model would be another one.
    for name in ("target.decoder.logits_dense.kernel", "target.encoder.layers_0.mlp.wo.kernel"):
        (path / name).rename(tmp_path / name)
    with pytest.raises(ValueError, match="of which 2 cannot be opened") as caught:
        read(path, "gated-gelu")
    assert "target.encoder.layers_0.mlp.wo.kernel (not there)" in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_chunk_that_is_missing_or_damaged(damage, tmp_path):
    path = damaged(tmp_path, lambda theirs: None, "references")
    chunk = path / "target.decoder.logits_dense.kernel" / "1.0"
    chunk.unlink() if damage == "missing" else chunk.write_bytes(chunk.read_bytes()[:50])
    with pytest.raises(
        ValueError, match=r"target.decoder.logits_dense.kernel cannot be read .*copy the checkpoint"
    ):
        read(path, "gated-gelu")


def test_what_is_and_is_not_t5xs(imported, tmp_path):
    steps = tmp_path / "steps"
    for step in (1, 2, 10):
        (steps / f"checkpoint_{step}").mkdir(parents=True)
    assert is_t5x(str(steps))
    with pytest.raises(ValueError, match="found checkpoint_1, checkpoint_2, checkpoint_10; give o"):
        read(steps)
    hugging_face = tmp_path / "hf"
    hugging_face.mkdir()
    (hugging_face / "config.json").write_text("{}")
    (hugging_face / "checkpoint").write_text("")
    ours = imported, imported / "checkpoints/1000"
    for path in (tmp_path / "absent", tmp_path, hugging_face, *ours):
        assert not is_t5x(str(path))


# --- The command line -----------------------------------------------------------------------------


def test_import_and_export_from_the_command_line(tmp_path, capsys):
    params = random_params(T5_1_0)
    path = write(tmp_path, train_state(to_t5x(params, FIRST)), "references")
    assert "has no tokenizer; give --vocabulary" in fails(capsys, "import", path, tmp_path / "run")
    status, out, err = run(capsys, "import", path, tmp_path / "run", "--vocabulary", "bytes")
    assert (status, out) == (0, "")
    assert "2 + 2 layers, d_model 12, d_ff 20, 3 heads of 5, vocabulary 384, relu, tied" in err
    assert run(capsys, "export", tmp_path / "run", tmp_path / "hf")[0] == 0
    assert_same(hf_io.load_params(tmp_path / "hf", hf_io.read_config(tmp_path / "hf")), params)

    message = fails(capsys, "infer", "--model", path, "--prompt", "a")
    assert f"{path} is a T5X checkpoint; make a run of it with `t5jax import" in message
    message = fails(capsys, "import", tmp_path / "hf", tmp_path / "other", "--vocabulary", "bytes")
    assert "--vocabulary is for T5X checkpoints" in message
    message = fails(capsys, "import", tmp_path / "hf", tmp_path / "other", "--loss-tokens", "0")
    assert "--loss-tokens is for T5X checkpoints" in message


def test_the_page_names_fields_that_there_are():
    page = (ROOT / "docs/t5x.md").read_text()
    config, sections = Config(), {field.name for field in dataclasses.fields(Config)}
    named = [name.split(".") for name in re.findall(r"`(\w+\.\w+)`", page)]
    named = [(s, field) for s, field in named if s in sections and field != "gin"]
    assert len(named) > 40
    for section, field in named:
        assert hasattr(getattr(config, section), field), f"{section}.{field}"


# --- A real checkpoint ----------------------------------------------------------------------------


@needs_real
def test_a_real_checkpoint_keeps_every_bit(tmp_path):
    out = str(tmp_path / "run")
    import_t5x(str(REAL), out, vocabulary=str(SPIECE), mlp_activation="gated-gelu")
    raw = serialization.msgpack_restore(REAL.read_bytes())["optimizer"]["target"]
    assert_same(
        {k: np.asarray(x) for k, x in to_t5x(find(out).read()[1], FIRST).items()},
        trees.flatten(raw),
    )


@needs_real
@pytest.mark.hf
@pytest.mark.slow
def test_a_real_checkpoint_computes_as_transformers_does(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = str(tmp_path / "run")
    import_t5x(str(REAL), out, vocabulary=str(SPIECE), mlp_activation="gated-gelu")
    export_model(out, str(tmp_path / "hf"), dtype="float32", max_shard_bytes=10**9, overwrite=False)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    model, params = find(out).read()
    batch = random_batch(model, rows=3, source=21, target=11)
    inputs = torch.tensor(batch["encoder_input_tokens"]).long()
    targets = torch.tensor(batch["decoder_target_tokens"]).long()
    with torch.no_grad():
        answer = theirs(
            input_ids=inputs,
            attention_mask=(inputs != 0).long(),
            labels=targets.masked_fill(targets == 0, -100),
            decoder_input_ids=torch.tensor(batch["decoder_input_tokens"]).long(),
        )
    logits = np.asarray(LOGITS(model, params, batch))
    real = batch["decoder_target_tokens"] != 0
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(logits[real], answer.logits.numpy()[real], atol=1e-4, rtol=0)
    _, sums = jax.jit(batch_loss, static_argnums=(0, 3))(
        model, params, batch, LossConfig(z_loss=0.0)
    )
    np.testing.assert_allclose(sums["nll"] / sums["tokens"], answer.loss, atol=1e-4, rtol=0)
