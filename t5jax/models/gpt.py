"""Decoder-only networks: GPT-2, Llama, Qwen 3, Gemma 2 and 3, and their single step.

The papers are those that `GPTConfig` names. What sets them apart are its fields: where positions
enter, which norm and where, how many heads share keys, which layers look how far, what is capped.

B batch, T length, P length of a prompt, D model, H heads, G heads of keys and values, K head dim,
V vocab, L layers.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from t5jax import batch as features
from t5jax.architectures import GPTConfig
from t5jax.models.attention import (
    causal_mask,
    grouped_query_attention,
    grouped_single_query_attention,
    rope_frequencies,
    rope_table,
    rotate,
    segment_mask,
    soft_cap,
    window_mask,
)
from t5jax.models.layers import (
    MLP,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    Unembedding,
    stack,
)
from t5jax.sharding import constrain


class Reach(flax.struct.PyTreeNode):
    """What tokens see and where they are, for global layers and, where they differ, local ones."""

    mask: jax.Array  # bool [B or 1, 1, T, T].
    local_mask: jax.Array | None
    rope: Any  # As `rope_table` returns it, or None.
    local_rope: Any

    def of(self, is_local):
        """Returns mask and rotation of one layer; `is_local` may be traced."""

        def choose(for_all, for_local):
            if for_local is None:
                return for_all
            return jax.tree.map(lambda a, b: jnp.where(is_local, b, a), for_all, for_local)

        return choose(self.mask, self.local_mask), choose(self.rope, self.local_rope)


class Cache(flax.struct.PyTreeNode):
    """What decoding remembers: argument and result of `decode_step`.

    Each layer has keys and values [B, G, S, K] of its own. Token `index` stands at place index % S:
    a global layer has places for all tokens, a local one for as many as its window, of which the
    newest takes that of the oldest.
    """

    index: jax.Array  # int32 []: tokens seen so far, padding among them.
    padding: jax.Array  # int32 [B]: how many of them, in front, are padding.
    positions: jax.Array  # int32 [B]: of the next token.
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def _norm(cfg: GPTConfig, name=None):
    if cfg.norm == "layernorm":
        return LayerNorm(cfg.norm_epsilon, cfg.dtype, cfg.param_dtype, name=name)
    return RMSNorm(cfg.norm_epsilon, cfg.dtype, cfg.param_dtype, cfg.norm_plus_one, name=name)


def _out_stddev(cfg: GPTConfig) -> float:
    # GPT-2, section 2.3: each of the 2 L branches adds to the residual stream's variance.
    return cfg.initializer_range * (2 * cfg.num_layers) ** -0.5


class Attention(nn.Module):
    """Self-attention in which several heads of queries share one of keys and values."""

    config: GPTConfig

    def setup(self):
        cfg = self.config
        D, H, G, K = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        kinds = (cfg.dtype, cfg.param_dtype, cfg.attention_bias)

        def projection(heads, axis):
            axes = ("embed", axis, "head_dim")
            return Linear("...D,DHK->...HK", (D, heads, K), axes, cfg.initializer_range, *kinds)

        self.query = projection(H, "heads")
        self.key = projection(G, "kv_heads")
        self.value = projection(G, "kv_heads")
        axes = ("heads", "head_dim", "embed")
        self.out = Linear("...HK,HKD->...D", (H, K, D), axes, _out_stddev(cfg), *kinds)
        if cfg.qk_norm:
            norm = (cfg.norm_epsilon, cfg.dtype, cfg.param_dtype, cfg.norm_plus_one, "head_dim")
            self.query_norm, self.key_norm = RMSNorm(*norm), RMSNorm(*norm)
        self.dropout = Dropout(cfg.dropout_rate)
        self.scores = {"scale": cfg.query_scale, "softcap": cfg.attention_softcap}

    def project(self, x_BTD, rope):
        """Returns queries [B, T, H, K], and keys and values [B, T, G, K]."""
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.config.qk_norm:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        return rotate(q_BTHK, rope), rotate(k_BTGK, rope), v_BTGK

    def __call__(self, x_BTD, mask_B1TT, rope):
        """Returns [B, T, D], and the keys and values."""
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, rope)
        q_BTHK = constrain(q_BTHK, "batch", "length", "heads", "head_dim")
        k_BTGK = constrain(k_BTGK, "batch", "length", "kv_heads", "head_dim")
        v_BTGK = constrain(v_BTGK, "batch", "length", "kv_heads", "head_dim")
        h_BTHK = grouped_query_attention(
            q_BTHK, k_BTGK, v_BTGK, mask_B1TT, **self.scores, dropout=self.dropout
        )
        return self.out(h_BTHK), k_BTGK, v_BTGK

    def step(self, x_BD, keys_BGSK, values_BGSK, place, mask_BS, rope):
        """Returns [B, D] of one token, and what is kept, with its key and value at `place`."""
        q_B1HK, k_B1GK, v_B1GK = self.project(x_BD[:, None], rope)
        # Written first and read then: the other way round, the compiler copies the cache.
        keys_BGSK, values_BGSK = (
            jax.lax.dynamic_update_slice(kept, jnp.swapaxes(new, 1, 2), (0, 0, place, 0))
            for kept, new in ((keys_BGSK, k_B1GK), (values_BGSK, v_B1GK))
        )
        h_BHK = grouped_single_query_attention(
            q_B1HK[:, 0], keys_BGSK, values_BGSK, mask_BS, **self.scores
        )
        return self.out(h_BHK), keys_BGSK, values_BGSK


class Layer(nn.Module):
    """Attention and MLP, each a branch of the residual stream."""

    config: GPTConfig

    def setup(self):
        cfg = self.config
        self.pre_attention_norm = _norm(cfg)
        self.attention = Attention(cfg)
        self.pre_mlp_norm = _norm(cfg)
        self.mlp = MLP(
            cfg.d_model,
            cfg.d_ff,
            cfg.mlp_activation.removeprefix("gated-"),
            cfg.gated,
            0.0,
            cfg.initializer_range,
            _out_stddev(cfg),
            cfg.dtype,
            cfg.param_dtype,
            cfg.mlp_bias,
        )
        if cfg.post_norms:
            self.post_attention_norm = _norm(cfg)
            self.post_mlp_norm = _norm(cfg)
        self.dropout = Dropout(cfg.dropout_rate)

    def __call__(self, x_BTD, is_local, reach: Reach):
        return self.read(x_BTD, is_local, reach)[0], None

    def read(self, x_BTD, is_local, reach: Reach):
        """Returns [B, T, D], and attention's keys and values."""
        h_BTD = self.pre_attention_norm(x_BTD)
        h_BTD, k_BTGK, v_BTGK = self.attention(h_BTD, *reach.of(is_local))
        x_BTD = self._add_attention(x_BTD, h_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")
        x_BTD = self._add_mlp(x_BTD)
        return constrain(x_BTD, "batch", "length", "activation_embed"), k_BTGK, v_BTGK

    def step(self, x_BD, *kept):
        """The same for one token; `kept` and what is returned are those of `Attention.step`."""
        h_BD, keys, values = self.attention.step(self.pre_attention_norm(x_BD), *kept)
        return self._add_mlp(self._add_attention(x_BD, h_BD)), keys, values

    def _add_attention(self, x, h):
        return x + self.dropout(self.post_attention_norm(h) if self.config.post_norms else h)

    def _add_mlp(self, x):
        h = self.mlp(self.pre_mlp_norm(x))
        return x + self.dropout(self.post_mlp_norm(h) if self.config.post_norms else h)


class Decoder(nn.Module):
    """All layers, and the norm behind them."""

    config: GPTConfig

    def setup(self):
        cfg = self.config
        self.layers = stack(Layer, cfg, cfg.num_layers, in_axes=(0, nn.broadcast))(cfg)
        self.final_norm = _norm(cfg)

    def __call__(self, x_BTD, reach: Reach):
        x_BTD, _ = self.layers(x_BTD, jnp.array(self.config.local_layers), reach)
        return self.final_norm(x_BTD)


class Network(nn.Module):
    """The whole network. `t5jax.models.api` wraps its methods as functions of parameters."""

    config: GPTConfig

    def setup(self):
        cfg = self.config
        table = (cfg.d_model, cfg.initializer_range, cfg.dtype, cfg.param_dtype)
        self.token_embedder = Embedding(cfg.vocab_size, *table)
        if cfg.position == "learned":
            self.position_embedder = Embedding(cfg.max_positions, *table, axis="length")
        self.dropout = Dropout(cfg.dropout_rate)
        self.decoder = Decoder(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = Unembedding(
                cfg.d_model, cfg.vocab_size, cfg.initializer_range, cfg.dtype, cfg.param_dtype
            )

    def embed(self, tokens, positions):
        """Returns [..., D] for tokens [...] at positions that have as many dimensions."""
        cfg = self.config
        x = self.token_embedder(tokens)
        if cfg.scale_embedding:
            x *= jnp.asarray(cfg.d_model**0.5, cfg.dtype)  # Rounded, as Gemma was trained.
        if cfg.position == "learned":
            x += self.position_embedder(positions)
        return x

    def hidden(self, batch):
        """Returns the decoder's output [B, T, D], ready for `unembed`."""
        tokens_BT = batch[features.DECODER_INPUT_TOKENS]
        x_BTD = self.embed(tokens_BT, _positions(self.config, batch))
        x_BTD = constrain(self.dropout(x_BTD), "batch", "length", "activation_embed")
        return self.decoder(x_BTD, _reach(self.config, batch))

    def unembed(self, x_BTD):
        """Returns float32 logits [..., V] for `hidden`'s output [..., D]."""
        cfg = self.config
        logits = (
            self.token_embedder.attend(x_BTD) if cfg.tie_word_embeddings else (self.lm_head(x_BTD))
        )
        return logits if cfg.final_softcap is None else soft_cap(logits, cfg.final_softcap)

    def logits(self, batch):
        logits_BTV = self.unembed(self.hidden(batch))
        return constrain(logits_BTV, "batch", "length", "vocab")


def _positions(cfg: GPTConfig, batch) -> jax.Array:
    """Returns int32 [B or 1, T]: where each token stands in its text."""
    if features.DECODER_POSITIONS in batch:
        return batch[features.DECODER_POSITIONS]
    length = batch[features.DECODER_INPUT_TOKENS].shape[1]
    _check_length(cfg, length)
    return jnp.arange(length)[None]


def _check_length(cfg: GPTConfig, length: int) -> None:
    if cfg.position == "learned" and length > cfg.max_positions:
        raise ValueError(
            f"a text of {length} tokens has no positions in this model; {cfg.family} learned "
            f"{cfg.max_positions} (model.max_positions); cut the text, or write fewer tokens"
        )


def _reach(cfg: GPTConfig, batch) -> Reach:
    """Returns what each token of a batch sees, and how its query and key are turned."""
    length = batch[features.DECODER_INPUT_TOKENS].shape[1]
    mask_B1TT = causal_mask(length)
    if features.DECODER_CAUSAL_ATTENTION in batch:
        is_input_BT = batch[features.DECODER_CAUSAL_ATTENTION] == 1
        mask_B1TT |= is_input_BT[:, None, :, None] & is_input_BT[:, None, None, :]
    if features.DECODER_SEGMENT_IDS in batch:
        ids_BT = batch[features.DECODER_SEGMENT_IDS]
        mask_B1TT &= segment_mask(ids_BT, ids_BT)
    local_mask = None
    if any(cfg.local_layers):
        # Distances in a row: inside one text they are those of positions.
        local_mask = mask_B1TT & window_mask(length, cfg.sliding_window)
    return Reach(mask_B1TT, local_mask, *_ropes(cfg, _positions(cfg, batch)))


def _ropes(cfg: GPTConfig, positions_BT):
    """Returns the rotations of global layers, and of local ones where they are others."""
    if cfg.position != "rope":
        return None, None
    frequencies = rope_frequencies(
        cfg.head_dim,
        cfg.rope_theta,
        scaling=cfg.rope_scaling,
        factor=cfg.rope_scaling_factor,
        low_factor=cfg.rope_low_frequency_factor,
        high_factor=cfg.rope_high_frequency_factor,
        original_length=cfg.rope_original_max_positions,
    )
    local_rope = None
    if cfg.rope_local_theta is not None:
        local_frequencies = rope_frequencies(cfg.head_dim, cfg.rope_local_theta)
        local_rope = rope_table(positions_BT, local_frequencies)
    return rope_table(positions_BT, frequencies), local_rope


def unembed_params(cfg: GPTConfig) -> tuple[str, ...]:
    """Returns the names of the parameters that `Network.unembed` reads."""
    return ("token_embedder",) if cfg.tie_word_embeddings else ("lm_head",)


# --- Decoding, one token at a time ---------------------------------------------------------------


def arrange_for_decoding(cfg: GPTConfig, params):
    """Returns the parameters as a decoding loop reads them fastest.

    Matrices have the dtype they are computed in, and each layer arrays of its own: slices of a
    stack would be copied at every token.
    """
    dtype = jnp.dtype(cfg.dtype)

    def cast(path, x):
        return x.astype(dtype) if path[-1].key in ("kernel", "embedding") else x

    params = jax.tree_util.tree_map_with_path(cast, params)
    return params | {"decoder": params["decoder"] | {"layers": _layers(cfg, params)}}


def _layers(cfg: GPTConfig, params) -> tuple:
    """Returns each layer's parameters."""
    layers = params["decoder"]["layers"]
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(cfg.num_layers))


def prefill(cfg: GPTConfig, params, batch, max_length: int) -> tuple[jax.Array, Cache]:
    """Reads the prompts, and makes room for `max_length` tokens behind them.

    Raises:
      ValueError: for prompts without padding that learned positions are too few for. With padding,
        who pads has to see to it: what a row's padding is, is not known here.
    """
    tokens_BP = batch[features.DECODER_INPUT_TOKENS]
    length = tokens_BP.shape[1]
    network, layer = Network(cfg), Layer(cfg)
    padding_B = jnp.zeros(len(tokens_BP), jnp.int32)
    if features.DECODER_SEGMENT_IDS in batch:
        padding_B = jnp.sum(batch[features.DECODER_SEGMENT_IDS] == 0, axis=1, dtype=jnp.int32)
    else:
        _check_length(cfg, length + max_length - 1)  # The last token is not read.
    positions_BP = _positions(cfg, batch)
    reach = _reach(cfg, batch)
    x_BPD = network.apply({"params": params}, tokens_BP, positions_BP, method="embed")
    keys, values = [], []
    for is_local, layer_params in zip(cfg.local_layers, _layers(cfg, params), strict=True):
        x_BPD, *kept = layer.apply({"params": layer_params}, x_BPD, is_local, reach, method="read")
        size = length + max_length
        size = min(size, cfg.sliding_window) if is_local else size
        for all_layers, new_BPGK in zip((keys, values), kept, strict=True):
            all_layers.append(_keep(new_BPGK, size))
    cache = Cache(
        index=jnp.int32(length),
        padding=padding_B,
        positions=jnp.broadcast_to(positions_BP[:, -1] + 1, padding_B.shape).astype(jnp.int32),
        keys=tuple(keys),
        values=tuple(values),
    )
    return _logits(cfg, params, x_BPD[:, -1]), cache


def _keep(new_BPGK, size: int) -> jax.Array:
    """Returns a cache [B, G, S, K] of keys or values: token i at place i % S, as many as fit."""
    length = new_BPGK.shape[1]
    new_BGPK = jnp.swapaxes(new_BPGK, 1, 2)
    if length <= size:
        return jnp.pad(new_BGPK, ((0, 0), (0, 0), (0, size - length), (0, 0)))
    return jnp.roll(new_BGPK[:, :, -size:], length % size, axis=2)


def decode_step(cfg: GPTConfig, params, cache: Cache, tokens_B):
    """Returns float32 logits [B, V] of the next token, and the cache with this one."""
    network, layer = Network(cfg), Layer(cfg)
    rope, local_rope = _ropes(cfg, cache.positions[:, None])
    x_BD = network.apply({"params": params}, tokens_B, cache.positions, method="embed")
    keys, values = [], []
    kept = zip(cfg.local_layers, _layers(cfg, params), cache.keys, cache.values, strict=True)
    for is_local, layer_params, keys_BGSK, values_BGSK in kept:
        size = keys_BGSK.shape[2]
        # The token that stands at each place; before the first one, a negative index.
        held_S = cache.index - (cache.index - jnp.arange(size)) % size
        x_BD, *new = layer.apply(
            {"params": layer_params},
            x_BD,
            keys_BGSK,
            values_BGSK,
            cache.index % size,
            held_S[None] >= cache.padding[:, None],
            local_rope if is_local and local_rope is not None else rope,
            method="step",
        )
        keys.append(new[0])
        values.append(new[1])
    cache = cache.replace(
        index=cache.index + 1,
        positions=cache.positions + 1,
        keys=tuple(keys),
        values=tuple(values),
    )
    return _logits(cfg, params, x_BD), cache


def _logits(cfg: GPTConfig, params, x_BD) -> jax.Array:
    """Returns float32 logits [B, V] of what the last layer returned."""
    x_BD = _norm(cfg).apply({"params": params["decoder"]["final_norm"]}, x_BD)
    return Network(cfg).apply({"params": params}, x_BD, method="unembed")
