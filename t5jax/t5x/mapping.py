"""T5X's T5: its parameters and Adafactor's state with our names and in our layout.

A T5X checkpoint has no config. The network is inferred from the shapes: vocabulary, widths, layers,
heads (from the relative bias), gated or not, tied or not. The rest is fixed in T5X's code (a tied
head's input is scaled, 128 is the largest distance, pad 0 and eos 1), except for the activation of
a gated MLP.

Source: T5X's `examples/t5/network.py` and `examples/scalable_t5/network.py`, `adafactor.py`. The
second has a relative bias in every layer, heads and their dimension as two axes, and by default
stacks layers on axis 1.

Axes: v vocab, d model, h heads, k head dim, f mlp, n buckets, l layers.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from t5jax import trees
from t5jax.architectures import SIZES, MlpActivation, T5Config
from t5jax.hf.io import read_leaf, read_params
from t5jax.hf.mapping import Index, Rearrange, Row, Tensor, Tensors
from t5jax.models import api
from t5jax.train_state import TrainState

_PARAMS, _STATES = "target", "state/param_states"


# --- The table ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Param:
    """A parameter of ours and of theirs."""

    ours: str
    """Path."""
    theirs: str
    """Path; if it contains "{layer}", one for each layer."""
    axes: tuple[str, ...]
    """The axes of theirs, in order; "h k" are two of ours merged."""

    def row(self) -> Row:
        return Row(self.ours, f"{_PARAMS}/{self.theirs}", _view(self.axes))

    def slot(self, name: str, view: Rearrange) -> Row:
        """Returns the row of a slot of Adafactor's state for it."""
        return Row(self.ours, f"{_STATES}/{self.theirs}/{name}", view)


def _view(axes: Iterable[str]) -> Rearrange:
    """Returns the layout of an array with these axes; in ours, layers come first."""
    theirs = " ".join(f"({axis})" if " " in axis else axis for axis in axes)
    return Rearrange(f"{theirs} -> {' '.join(_our_axes(axes))}")


def _our_axes(axes: Iterable[str]) -> list[str]:
    return " ".join(sorted(axes, key=lambda axis: axis != "l")).split()


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The options of T5X, apart from the network's sizes."""

    scanned: bool
    """Layers are stacked, on axis 1."""
    joined: bool
    """Heads and their dimension are one axis."""

    def layer(self, stack: str) -> str:
        """Returns the path of a layer's parameters, of the first if they are separate."""
        return f"{stack}/{stack}" if self.scanned else f"{stack}/layers_0"


def _layout(tensors: Tensors) -> _Layout:
    scanned = any(name.startswith(f"{_PARAMS}/encoder/encoder/") for name in tensors)
    query = tensors.get(f"{_PARAMS}/{_Layout(scanned, True).layer('encoder')}/{_QUERY}")
    return _Layout(scanned, query is None or len(query.shape) == 2 + scanned)


_QUERY = "attention/query/kernel"
_ATTENTIONS = {  # Ours to theirs.
    "encoder": {"attention": "attention"},
    "decoder": {"self_attention": "self_attention", "cross_attention": "encoder_decoder_attention"},
}


def _table(config: T5Config, layout: _Layout) -> list[_Param]:
    table = [_Param("token_embedder/embedding", "token_embedder/embedding", ("v", "d"))]
    if not config.tie_word_embeddings:
        table.append(_Param("lm_head/kernel", "decoder/logits_dense/kernel", ("d", "v")))
    heads = ("h k",) if layout.joined else ("h", "k")
    for stack, attentions in _ATTENTIONS.items():
        theirs_of_layer = layout.layer(stack).replace("layers_0", "layers_{layer}")

        def add(
            ours: str, theirs: str, *axes: str, stack: str = stack, above: str = theirs_of_layer
        ) -> None:
            axes = (axes[0], "l", *axes[1:]) if layout.scanned else axes
            table.append(_Param(f"{stack}/layers/{ours}", f"{above}/{theirs}", axes))

        for ours, theirs in attentions.items():
            add(f"pre_{ours}_norm/scale", f"pre_{ours}_layer_norm/scale", "d")
            for part in ("query", "key", "value"):
                add(f"{ours}/{part}/kernel", f"{theirs}/{part}/kernel", "d", *heads)
            add(f"{ours}/out/kernel", f"{theirs}/out/kernel", *heads, "d")
        add("pre_mlp_norm/scale", "pre_mlp_layer_norm/scale", "d")
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            add(f"mlp/{name}/kernel", f"mlp/{name}/kernel", "d", "f")
        add("mlp/wo/kernel", "mlp/wo/kernel", "f", "d")
        if config.per_layer_relative_bias:
            add("relative_bias/embedding", "relpos_bias/rel_embedding", "h", "n")
        else:
            bias = f"{stack}/relpos_bias/rel_embedding"
            table.append(_Param(f"{stack}/relative_bias/embedding", bias, ("h", "n")))
        norm = f"{stack}/{stack}_norm/scale"
        table.append(_Param(f"{stack}/final_norm/scale", norm, ("d",)))
    return table


# --- The description ----------------------------------------------------------------------------

# Fields that cannot be inferred from shapes, or that a run sets.
_NOT_OF_SHAPES = ("mlp_activation", "dropout_rate", "initializer_factor")


def describe(tensors: Tensors, where: str, activation: MlpActivation | None = None) -> T5Config:
    """Returns the description of the network whose parameters these are.

    Args:
      tensors: as returned by `files.open_tensors`.
      where: their origin, for messages.
      activation: the activation of the MLP. None: that of a published size with the same shapes.
    Raises:
      ValueError: if this is not T5X's encoder-decoder, or its activation is not known.
    """
    layout = _layout(tensors)
    layer = layout.layer("encoder")

    def find(*names: str) -> tuple[str, tuple[int, ...]]:
        for name in names:
            if f"{_PARAMS}/{name}" in tensors:
                shape = tuple(tensors[f"{_PARAMS}/{name}"].shape)
                if len(shape) < 2:
                    raise ValueError(f"{where}: {name} is {list(shape)}; expected a matrix")
                return name, shape
        there = [name.removeprefix(f"{_PARAMS}/") for name in tensors if name.startswith(_PARAMS)]
        raise ValueError(
            f"{where} holds no encoder-decoder of T5X's: there is no {' or '.join(names)} among "
            f"its {len(there)} parameters ({', '.join(sorted(there)[:4])}, ...)"
        )

    _, (vocab_size, *_, d_model) = find("token_embedder/embedding")
    bias, (num_heads, *_, num_buckets) = find(
        "encoder/relpos_bias/rel_embedding", f"{layer}/relpos_bias/rel_embedding"
    )
    _, (*_, d_kv) = find(f"{layer}/{_QUERY}")
    if layout.joined and d_kv % num_heads:
        raise ValueError(
            f"{where}: {_QUERY} is {d_kv} wide, which the {num_heads} heads of {bias} do not "
            "divide; expected T5X's own T5"
        )
    wi, (*_, d_ff) = find(f"{layer}/mlp/wi_0/kernel", f"{layer}/mlp/wi/kernel")
    find(f"{layout.layer('decoder')}/mlp/wo/kernel")
    tied = f"{_PARAMS}/decoder/logits_dense/kernel" not in tensors
    config = T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_kv // num_heads if layout.joined else d_kv,
        d_ff=d_ff,
        num_heads=num_heads,
        num_encoder_layers=_num_layers("encoder", tensors),
        num_decoder_layers=_num_layers("decoder", tensors),
        mlp_activation="gated-gelu" if "wi_0" in wi else "relu",
        tie_word_embeddings=tied,
        scale_decoder_outputs=tied,
        relative_attention_num_buckets=num_buckets,
        per_layer_relative_bias=bias.startswith(layer),
    )
    return dataclasses.replace(config, mlp_activation=_activation(config, where, activation))


def _num_layers(stack: str, tensors: Tensors) -> int:
    own = [re.match(rf"{_PARAMS}/{stack}/layers_(\d+)/", name) for name in tensors]
    if any(own):
        return 1 + max(int(match[1]) for match in own if match)
    shapes = [
        tensor.shape
        for name, tensor in tensors.items()
        if name == f"{_PARAMS}/{stack}/{stack}/pre_mlp_layer_norm/scale"
    ]
    return (
        shapes[0][1] if shapes and len(shapes[0]) == 2 else 1
    )  # 1: the check lists what does not match.


def _activation(config: T5Config, where: str, asked: MlpActivation | None) -> MlpActivation:
    possible: tuple[MlpActivation, ...] = (
        ("gated-gelu", "gated-silu") if config.gated else ("relu",)
    )
    if asked is not None and asked not in possible:
        raise ValueError(
            f"--mlp-activation is {asked}, but the MLP of {where} is "
            f"{'gated' if config.gated else 'not gated'}; expected {' or '.join(possible)}"
        )
    alike = {
        size.mlp_activation
        for size in SIZES.values()
        if isinstance(size, T5Config)
        and all(
            getattr(size, field.name) == getattr(config, field.name)
            for field in dataclasses.fields(T5Config)
            if field.name not in _NOT_OF_SHAPES
        )
    }
    found = {asked} if asked else alike & set(possible) or set(possible)
    if len(found) > 1:
        raise ValueError(
            f"{where} does not tell the activation of its gated MLP, and no published size has its "
            f"shapes; give --mlp-activation {' or '.join(possible)} (T5X's "
            "network.T5Config.mlp_activations: 'gelu' or 'silu')"
        )
    return found.pop()


# --- Parameters and Adafactor's state -----------------------------------------------------------


def load_params(
    tensors: Tensors, config: T5Config, where: str, shardings: Any = None
) -> api.Params:
    """Returns the parameters, in `config.param_dtype`.

    Args:
      tensors: as returned by `files.open_tensors`.
      config: as returned by `describe`.
      where: their origin, for messages.
      shardings: as for `hf.io.load_params`.
    Raises:
      ValueError: if tensors are missing, unexpected or have other shapes, with all of them.
    """
    rows = [param.row() for param in _table(config, _layout(tensors))]
    params = {name: x for name, x in tensors.items() if not name.startswith("state/")}
    return read_params(rows, config, params, where, shardings)


def step(tensors: Tensors) -> int:
    """Returns the number of updates before a checkpoint."""
    return int(np.asarray(tensors["state/step"][()])) if "state/step" in tensors else 0


def has_adafactor(tensors: Tensors) -> bool:
    return any(name.startswith(_STATES) and name.endswith("/v_row") for name in tensors)


def has_momentum(tensors: Tensors) -> bool:
    """Returns whether T5X's Adafactor had beta1."""
    moments = (x for name, x in tensors.items() if name.startswith(_STATES) and name[-2:] == "/m")
    return any(tuple(x.shape) != (1,) for x in moments)


def load_opt_state(
    tensors: Tensors,
    config: T5Config,
    shapes: TrainState,
    shardings: TrainState,
    loss_tokens: float = 1,
) -> tuple[Any, list[str]]:
    """Returns the state of `optimizers.make_optimizer`'s Adafactor that continues T5X's.

    Running means are converted bit for bit. If T5X did not factor a matrix and we do, the factors
    are the means over columns and rows, as they would have been.

    Args:
      tensors: as returned by `files.open_tensors`.
      config: as returned by `describe`.
      shapes: the train state with this optimizer, as ShapeDtypeStructs.
      shardings: the same tree of jax.sharding.Sharding.
      loss_tokens: the ratio of T5X's gradient to ours, which is a mean over target tokens. Mean
        squares are divided by its square; momentum is that of updates, which do not depend on it.
    Returns:
      The state, and the names of T5X's parameters without usable statistics, which are reset.
    """
    table = {param.ours: param for param in _table(config, _layout(tensors))}
    params = trees.flatten(shapes.params)
    num_updates, lost = step(tensors), []

    def one(path: Any, leaf: Any, sharding: Any) -> jax.Array:
        slot = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)][-1]
        ours = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        if slot == "count":
            return jax.device_put(np.asarray(num_updates, leaf.dtype), sharding)
        if leaf.shape != (1,):  # Otherwise the parameter does not use it.
            for row in _slots(slot, table[ours], params[ours].shape):
                found = row.their_shapes(leaf.shape)
                if all(n in tensors and tuple(tensors[n].shape) == found[n] for n in found):
                    array = read_leaf(row, leaf, tensors, sharding)
                    if slot == "ema":
                        # T5X averages what it subtracts from a parameter, optax what it adds.
                        return -array
                    return array if loss_tokens == 1 else array / np.float32(loss_tokens) ** 2
            lost.append(table[ours].theirs)
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding)

    state = jax.tree_util.tree_map_with_path(one, shapes.opt_state, shardings.opt_state)
    return state, sorted(set(lost))


def _slots(slot: str, param: _Param, shape: tuple[int, ...]) -> list[Row]:
    """Returns the rows that T5X may have for a slot of Adafactor's state.

    Args:
      slot: v_row, v_col, v, or ema (momentum).
      shape: the shape of our parameter.
    """
    whole = _view(param.axes)
    if slot in ("v", "ema"):
        return [param.slot("m" if slot == "ema" else "v", whole)]
    kept = [axis for axis in param.axes if axis == "l" or (axis == "d") == (slot == "v_row")]
    if param.row().stacked:
        shape = shape[1:]
    # Our rows are d, and so are T5X's with more than two axes. With two, its rows are the shorter
    # one, or the first.
    if len(param.axes) == 2 and np.argmin(whole.their_shape(shape)) != param.axes.index("d"):
        slot = {"v_row": "v_col", "v_col": "v_row"}[slot]
    left_out = [
        dim for dim, axis in enumerate(_our_axes(param.axes)) if axis not in _our_axes(kept)
    ]
    mean = _Mean(whole.pattern, shape, tuple(left_out))
    return [param.slot(slot, _view(kept)), param.slot("v", mean)]


@dataclasses.dataclass(frozen=True)
class _Mean(Rearrange):
    """The mean of theirs over some axes of ours; can only be read."""

    whole: tuple[int, ...]
    """Ours before the mean."""
    dims: tuple[int, ...]

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return super().their_shape(self.whole)

    def read(self, tensor: Tensor, index: Index, shape: tuple[int, ...]) -> np.ndarray:
        everything = tuple(slice(0, size) for size in self.whole)
        return super().read(tensor, everything, self.whole).mean(self.dims)[index]
