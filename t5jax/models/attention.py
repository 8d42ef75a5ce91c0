"""Attention: one function for all networks, a description of its mask, and its implementations.

A network says what a query sees and which bias its distance to a key has. What that becomes is up
to the implementation ("backend"):

* reference: plain JAX, with scores and a mask of shape [T, S] in memory.
* flash: the kernel for TPU in `t5jax/models/kernels/flash.py`, which reads the descriptions.
* cudnn: `jax.nn.dot_product_attention` on a GPU, for attention without a bias, a cap and dropout,
  which it lacks. (It has a bias, but does not return its gradient for all shapes.)

The platform of the mesh chooses one, also if a program is compiled for devices of another machine;
`use_backend` overrides it. Decoding reads a cache, always in plain JAX.

B batch, T query length, S key length, H heads, G heads of keys and values, K head dim,
R = T + S - 1 distances.
"""

import contextlib
import functools
import logging
import operator
from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp

from t5jax import sharding
from t5jax.models.positions import spread_over_diagonals

_log = logging.getLogger(__name__)

# Finite, so that the softmax of a row without keys is uniform instead of NaN.
MASKED = -1e9


class AttentionMask(flax.struct.PyTreeNode):
    """Which keys each query attends to. Only `attention` turns this into an array.

    A field that is set masks keys, except for `prefix_BT`, which makes exceptions from `causal`.
    Positions of queries and keys count from the first token of the row.
    """

    causal: bool = flax.struct.field(pytree_node=False, default=False)
    """No keys after the query."""
    prefix_BT: jax.Array | None = None
    """causal: bool, tokens that attend to each other in both directions."""
    window: jax.Array | int | None = None
    """Only keys less than this many tokens away, in both directions; int32 []."""
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    """Only keys of the query's segment, int32. Set both fields."""
    is_token_BS: jax.Array | None = None
    """Only keys that are tokens, bool: neither padding nor empty entries of a cache."""

    @classmethod
    def within(cls, segments_BT, **fields) -> "AttentionMask":
        """Returns the mask of self-attention within segments."""
        return cls(query_segments_BT=segments_BT, key_segments_BS=segments_BT, **fields)

    def dense(self, num_queries: int, num_keys: int) -> jax.Array:
        """Returns bool [B or 1, 1, T or 1, S or 1], true where the query attends to the key."""
        query_T1, key_1S = jnp.arange(num_queries)[:, None], jnp.arange(num_keys)[None]
        masks = [jnp.ones((1, 1, 1, 1), bool)]
        if self.causal:
            mask = (key_1S <= query_T1)[None, None]
            if self.prefix_BT is not None:
                prefix_BT = self.prefix_BT
                mask |= prefix_BT[:, None, :, None] & prefix_BT[:, None, None, :]
            masks.append(mask)
        if self.window is not None:
            masks.append((jnp.abs(query_T1 - key_1S) < self.window)[None, None])
        if self.query_segments_BT is not None:
            ids_BT, ids_BS = self.query_segments_BT, self.key_segments_BS
            masks.append(ids_BT[:, None, :, None] == ids_BS[:, None, None, :])
        if self.is_token_BS is not None:
            masks.append(self.is_token_BS[:, None, None, :])
        return functools.reduce(operator.and_, masks)


# --- Backends -------------------------------------------------------------------------------------

_BY_PLATFORM = {"tpu": "flash", "gpu": "cudnn"}
# Part of jit's cache key, so that a function is traced again for another backend. Beside the
# choices of a config, "flash-interpreted" is the kernel in Pallas's interpreter, for tests on CPU.
_chosen = jax.make_user_context("auto")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Sets the backend of attention for everything traced inside.

    Args:
      name: "auto", "reference", "flash" or "cudnn"; see `train.attention` in `t5jax.config`.
    Raises:
      ValueError: if the devices of the mesh cannot run it.
    """
    check_backend(name, sharding.platform())
    with _chosen(name):
        yield


def check_backend(name: str, platform: str) -> None:
    """Raises ValueError if a backend does not run on a platform."""
    needed = next((p for p, own in _BY_PLATFORM.items() if own == name), platform)
    if platform != needed:
        raise ValueError(
            f"train.attention is {name}, which runs on {needed} only, but the devices are "
            f"{platform}; set train.attention to auto or reference"
        )


def backend() -> str:
    """Returns the backend that the mesh and `use_backend` choose."""
    chosen = _chosen.value
    return _BY_PLATFORM.get(sharding.platform(), "reference") if chosen == "auto" else chosen


def shared_bias(bias_HR: jax.Array, num_queries: int) -> jax.Array:
    """Returns a bias that several layers add, as the backend reads it.

    The reference adds a matrix, [1, H, T, S]: it and its gradient are computed once for all layers,
    outside their scan. The kernel reads the bias of each distance.

    Args:
      bias_HR: float32, the bias of distances 1 - T to S - 1.
      num_queries: T.
    """
    return bias_HR if _is_flash() else spread_over_diagonals(bias_HR, num_queries)


def _is_flash() -> bool:
    return backend().startswith("flash")


def attention(
    q_BTHK,
    k,
    v,
    mask: AttentionMask,
    *,
    bias=None,
    scale: float = 1.0,
    softcap: float | None = None,
    dropout=None,
    cached: bool = False,
):
    """Returns softmax(cap(scale q k) + bias) v.

    H / G query heads share one head of keys and values. T5 has a scale of 1, since 1/sqrt(K) is
    folded into the initializer of queries.

    Args:
      q_BTHK: queries.
      k: keys [B, S, G, K], or if `cached`, [B, G, S, K] as in `cache.Cache`; in the dtype of the
        queries, which is that of the result.
      v: values, likewise.
      mask: which keys each query attends to.
      bias: float32 [H, R], the bias of distances (key minus query) 1 - T to S - 1 in this order; or
        as a matrix [B or 1, H, T, S], for the reference; or None.
      scale: the factor of the scores.
      softcap: the cap of the function `soft_cap`, or None.
      dropout: a dropout of the probabilities with one mask for all queries of a row, as
        `layers.Dropout`, or None.
      cached: the layout of k and v. In a cache, heads precede tokens, so that a few queries read
        memory contiguously. They may be `cache.Rounded`.
    Returns:
      [B, T, H, K]. Scores and softmax are float32. The output of a query that sees no key depends
      on the backend.
    Source: Vaswani et al. 2017 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245) for the
      groups; the cap is Gemma 2's.
    """
    k, v = (x.floats(q_BTHK.dtype) if hasattr(x, "floats") else x for x in (k, v))
    scores = {"bias": bias, "scale": scale, "softcap": softcap, "dropout": dropout}
    if not cached and _is_flash():
        from t5jax.models.kernels.flash import flash_attention  # Pallas takes time to import.

        interpret = backend() == "flash-interpreted"
        return flash_attention(q_BTHK, k, v, mask, **scores, interpret=interpret)
    if not cached and backend() == "cudnn":
        lacking = _lacking_in_cudnn(q_BTHK, bias, softcap, dropout)
        if lacking is None:
            try:
                return fused_attention(q_BTHK, k, v, mask, scale=scale, implementation="cudnn")
            except (NotImplementedError, RuntimeError, ValueError) as error:
                # This version of cuDNN, or this GPU, cannot do it.
                lacking = str(error)
        if _chosen.value == "cudnn":
            raise ValueError(
                f"train.attention is cudnn, which cannot compute this model's attention: {lacking};"
                " set train.attention to auto or reference"
            )
        _warn_of_reference(lacking)
    return reference_attention(q_BTHK, k, v, mask, **scores, cached=cached)


@functools.cache  # Once, not for every layer.
def _warn_of_reference(lacking: str) -> None:
    _log.warning("attention is computed in plain JAX where cuDNN cannot do it: %s", lacking)


def reference_attention(
    q_BTHK, k, v, mask, *, bias=None, scale=1.0, softcap=None, dropout=None, cached=False
):
    """Returns what `attention` does, in plain JAX.

    A query that sees no key has the mean of all values.
    """
    kept = "BGSK" if cached else "BSGK"
    num_heads, num_groups = q_BTHK.shape[2], k.shape[kept.index("G")]
    # Without an axis of size 1 where no heads are shared: with it, XLA on CPU lays out the scores
    # in a way that makes a T5 1.1 small's step 7 % slower.
    group, shape = "G", (num_groups,)
    if num_groups != num_heads:
        group, shape = "GR", (num_groups, num_heads // num_groups)
    q = q_BTHK.reshape(*q_BTHK.shape[:2], *shape, q_BTHK.shape[3])
    scores = jnp.einsum(f"BT{group}K,{kept}->B{group}TS", q, k, preferred_element_type=jnp.float32)
    if scale != 1.0:
        scores *= scale
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    if bias is not None:
        if bias.ndim == 2:
            bias = spread_over_diagonals(bias, q_BTHK.shape[1])
        scores += bias.reshape(len(bias), *shape, *scores.shape[-2:])
    seen_B1TS = mask.dense(*scores.shape[-2:])
    seen = seen_B1TS if group == "G" else seen_B1TS[:, None]
    probs = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(v.dtype)
    if dropout is not None:
        probs = dropout(probs)
    return jnp.einsum(f"B{group}TS,{kept}->BT{group}K", probs, v).reshape(q_BTHK.shape)


def _lacking_in_cudnn(q_BTHK, bias, softcap, dropout) -> str | None:
    """Returns what cuDNN's kernel lacks or would compute wrongly, or None if nothing."""
    head_dim = q_BTHK.shape[-1]
    found = {
        "the gradient of its position bias": bias is not None,
        "its soft cap": softcap is not None,
        "its dropout of probabilities": bool(getattr(dropout, "rate", dropout is not None)),
        f"its dtype {q_BTHK.dtype}": q_BTHK.dtype != jnp.bfloat16,
        f"its head dim {head_dim}": head_dim % 8 != 0 or head_dim > 128,
        "a sharded length": sharding.mesh_axes(q_BTHK.shape[1:2], "length") != (None,),
    }
    return next((f"it lacks {name}" for name, lacks in found.items() if lacks), None)


def fused_attention(q_BTHK, k_BSGK, v_BSGK, mask: AttentionMask, *, scale, implementation):
    """Returns what `attention` does, without bias, cap and dropout, by JAX's own function.

    A causal mask is left to it where it is all; any other mask is an array.
    """
    is_plain = not jax.tree.leaves(mask)
    seen = None if is_plain else mask.dense(q_BTHK.shape[1], k_BSGK.shape[1])
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        mask=seen,
        scale=scale,
        is_causal=is_plain and mask.causal,
        implementation=implementation,
    )


def soft_cap(x, cap: float):
    """Returns cap * tanh(x / cap): about `x` if it is small, and never more than the cap."""
    return cap * jnp.tanh(x / cap)
