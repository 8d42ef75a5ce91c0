"""Decoder-only networks of all families, and a decoding step.

The families' files in `t5jax/architectures/` name the papers. The networks differ in the fields of
`GPTConfig`: position embeddings, norms and their place, grouped heads, local layers, soft caps.

B batch, N rows of a cache, T length, P length of a prompt, S tokens that are kept, D model,
H heads, G heads of keys and values, K head dim, V vocab.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from t5jax import batch as features
from t5jax.architectures import GPTConfig
from t5jax.models import cache as caches
from t5jax.models.attention import AttentionMask, attention, soft_cap
from t5jax.models.cache import Cache, LayerShape
from t5jax.models.layers import (
    MLP,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    Unembedding,
    layers_apart,
    stack,
)
from t5jax.models.positions import rope_frequencies, rope_table, rotate
from t5jax.sharding import constrain

_EVERYTHING = np.iinfo(np.int32).max


class Reach(flax.struct.PyTreeNode):
    """The masks and rotary embeddings of global layers and, if they differ, of local ones."""

    mask: AttentionMask
    window: int | None  # The window of local layers.
    rope: Any  # As returned by `rope_table`, or None.
    local_rope: Any

    def of(self, is_local):
        """Returns the mask and rotary embedding of one layer; `is_local` may be traced."""
        mask, rope = self.mask, self.rope
        if self.window is not None:
            mask = mask.replace(window=jnp.where(is_local, self.window, _EVERYTHING))
        if self.local_rope is not None:
            rope = jax.tree.map(lambda a, b: jnp.where(is_local, b, a), rope, self.local_rope)
        return mask, rope


def _norm(cfg: GPTConfig, name=None):
    if cfg.norm == "layernorm":
        return LayerNorm(cfg, cfg.norm_epsilon, name=name)
    return RMSNorm(cfg, cfg.norm_epsilon, cfg.norm_plus_one, name=name)


def _out_stddev(cfg: GPTConfig) -> float:
    # GPT-2, section 2.3: each of the 2 L branches adds to the variance of the residual stream.
    return cfg.initializer_range * (2 * cfg.num_layers) ** -0.5


class Attention(nn.Module):
    """Self-attention with grouped heads."""

    config: GPTConfig

    def setup(self):
        cfg = self.config
        model = {"embed": cfg.d_model}
        heads = {"heads": cfg.num_heads, "head_dim": cfg.head_dim}
        kv_heads = {"kv_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
        bias, stddev = cfg.attention_bias, cfg.initializer_range
        self.query = Linear(cfg, model, heads, stddev, use_bias=bias)
        self.key = Linear(cfg, model, kv_heads, stddev, use_bias=bias)
        self.value = Linear(cfg, model, kv_heads, stddev, use_bias=bias)
        self.out = Linear(cfg, heads, model, _out_stddev(cfg), use_bias=bias)
        if cfg.qk_norm:
            self.query_norm, self.key_norm = (
                RMSNorm(cfg, cfg.norm_epsilon, cfg.norm_plus_one, axis="head_dim") for _ in range(2)
            )
        self.dropout = Dropout(cfg.dropout_rate)
        self.scores = {"scale": cfg.query_scale, "softcap": cfg.attention_softcap}

    def project(self, x_BTD, rope):
        """Returns queries [B, T, H, K], and keys and values [B, T, G, K]."""
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.config.qk_norm:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        return rotate(q_BTHK, rope), rotate(k_BTGK, rope), v_BTGK

    def __call__(self, x_BTD, mask: AttentionMask, rope):
        """Returns [B, T, D], and the keys and values [B, T, G, K]."""
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, rope)
        q_BTHK = constrain(q_BTHK, "batch", "length", "heads", "head_dim")
        k_BTGK = constrain(k_BTGK, "batch", None, "kv_heads", "head_dim")
        v_BTGK = constrain(v_BTGK, "batch", None, "kv_heads", "head_dim")
        h_BTHK = attention(q_BTHK, k_BTGK, v_BTGK, mask, **self.scores, dropout=self.dropout)
        return self.out(h_BTHK), (k_BTGK, v_BTGK)

    def step(self, x_N1D, rope, positions_N, kept):
        """Returns [N, 1, D] for one token per row, and `kept` with its key and value.

        Args:
          positions_N: int32, the token's position in its row.
          kept: the keys and values [N, G, S, K] of this layer.
        """
        q_N1HK, k_N1GK, v_N1GK = self.project(x_N1D, rope)
        *kept, mask = caches.extend(*kept, k_N1GK[:, 0], v_N1GK[:, 0], positions_N)
        return self.out(attention(q_N1HK, *kept, mask, **self.scores, cached=True)), kept


class Layer(nn.Module):
    """Attention and MLP, with residual connections."""

    config: GPTConfig

    def setup(self):
        cfg = self.config
        self.pre_attention_norm = _norm(cfg)
        self.attention = Attention(cfg)
        self.pre_mlp_norm = _norm(cfg)
        self.mlp = MLP(
            cfg,
            cfg.mlp_activation,
            wi_stddev=cfg.initializer_range,
            wo_stddev=_out_stddev(cfg),
            use_bias=cfg.mlp_bias,
        )
        if cfg.post_norms:
            self.post_attention_norm = _norm(cfg)
            self.post_mlp_norm = _norm(cfg)
        self.dropout = Dropout(cfg.dropout_rate)

    def __call__(self, x_BTD, is_local, reach: Reach):
        return self.read(x_BTD, is_local, reach)[0], None

    def read(self, x_BTD, is_local, reach: Reach):
        """Returns [B, T, D], and the keys and values."""
        h_BTD = self.pre_attention_norm(x_BTD)
        h_BTD, keys_values = self.attention(h_BTD, *reach.of(is_local))
        x_BTD = self._add_attention(x_BTD, h_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")
        x_BTD = self._add_mlp(x_BTD)
        return constrain(x_BTD, "batch", "length", "activation_embed"), keys_values

    def step(self, x_N1D, *step):
        """The same for one token per row, with the additional arguments of `Attention.step`."""
        h_N1D, kept = self.attention.step(self.pre_attention_norm(x_N1D), *step)
        return self._add_mlp(self._add_attention(x_N1D, h_N1D)), kept

    def _add_attention(self, x, h):
        return x + self.dropout(self.post_attention_norm(h) if self.config.post_norms else h)

    def _add_mlp(self, x):
        h = self.mlp(self.pre_mlp_norm(x))
        return x + self.dropout(self.post_mlp_norm(h) if self.config.post_norms else h)


class Decoder(nn.Module):
    """All layers and the final norm."""

    config: GPTConfig

    def setup(self):
        cfg = self.config
        self.layers = stack(Layer, cfg, cfg.num_layers, in_axes=(0, nn.broadcast))(cfg)
        self.final_norm = _norm(cfg)

    def __call__(self, x_BTD, reach: Reach):
        is_local = jnp.array(self.config.local_layers)
        if (layers := layers_apart(self)) is not None:
            for i, own in enumerate(layers):
                layer = Layer(self.config, parent=None)
                x_BTD, _ = layer.apply({"params": own}, x_BTD, is_local[i], reach)
        else:
            x_BTD, _ = self.layers(x_BTD, is_local, reach)
        return self.final_norm(x_BTD)


class Network(nn.Module):
    """The whole network. `t5jax.models.api` wraps its methods as functions of parameters."""

    config: GPTConfig

    def setup(self):
        cfg = self.config
        stddev = cfg.initializer_range
        self.token_embedder = Embedding(cfg, cfg.vocab_size, cfg.d_model, stddev)
        if cfg.position == "learned":
            self.position_embedder = Embedding(
                cfg, cfg.max_positions, cfg.d_model, stddev, axis="positions"
            )
        self.dropout = Dropout(cfg.dropout_rate)
        self.decoder = Decoder(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = Unembedding(cfg, cfg.d_model, cfg.vocab_size, stddev)

    def embed(self, tokens, positions):
        """Returns [..., D] for tokens [...] at positions with the same number of dimensions."""
        cfg = self.config
        x = self.token_embedder(tokens)
        if cfg.scale_embedding:
            x *= jnp.asarray(cfg.d_model**0.5, cfg.dtype)  # Rounded, as in the training of Gemma.
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
        tied = cfg.tie_word_embeddings
        logits = self.token_embedder.attend(x_BTD) if tied else self.lm_head(x_BTD)
        return logits if cfg.final_softcap is None else soft_cap(logits, cfg.final_softcap)

    def logits(self, batch):
        logits_BTV = self.unembed(self.hidden(batch))
        return constrain(logits_BTV, "batch", "length", "vocab")


def _positions(cfg: GPTConfig, batch) -> jax.Array:
    """Returns int32 [B or 1, T], the position of each token in its text."""
    if features.DECODER_POSITIONS in batch:
        return batch[features.DECODER_POSITIONS]
    length = batch[features.DECODER_INPUT_TOKENS].shape[1]
    if cfg.position == "learned" and length > cfg.max_positions:
        raise ValueError(
            f"a text of {length} tokens has no positions in this model; {cfg.family} learned "
            f"{cfg.max_positions} (model.max_positions); cut the text"
        )
    return jnp.arange(length)[None]


def _reach(cfg: GPTConfig, batch) -> Reach:
    """Returns the masks and rotary embeddings of a batch."""
    mask = AttentionMask(causal=True)
    if features.DECODER_SEGMENT_IDS in batch:
        mask = AttentionMask.within(batch[features.DECODER_SEGMENT_IDS], causal=True)
    if features.DECODER_CAUSAL_ATTENTION in batch:
        mask = mask.replace(prefix_BT=batch[features.DECODER_CAUSAL_ATTENTION] == 1)
    return Reach(mask, cfg.sliding_window, *_ropes(cfg, _positions(cfg, batch)))


def _ropes(cfg: GPTConfig, positions_BT):
    """Returns the rotary embeddings of global layers, and of local ones if they differ."""
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


def cache_layers(cfg: GPTConfig) -> tuple[LayerShape, ...]:
    """Returns the shape of each layer's cache."""
    return tuple(
        LayerShape(cfg.num_kv_heads, cfg.head_dim, cfg.sliding_window if is_local else None)
        for is_local in cfg.local_layers
    )


def prefill(cfg: GPTConfig, params, batch) -> tuple[jax.Array, Cache]:
    """Reads the prompts, which are padded at the end."""
    tokens_BP = batch[features.DECODER_INPUT_TOKENS]
    lengths_B = jnp.full(len(tokens_BP), tokens_BP.shape[1], jnp.int32)
    if features.DECODER_SEGMENT_IDS in batch:
        lengths_B = jnp.sum(batch[features.DECODER_SEGMENT_IDS] != 0, axis=1, dtype=jnp.int32)
    network, layer, reach = Network(cfg), Layer(cfg), _reach(cfg, batch)
    positions_BP = _positions(cfg, batch)
    x_BPD = network.apply({"params": params}, tokens_BP, positions_BP, method="embed")
    kept = []
    for is_local, layer_params in zip(cfg.local_layers, params["decoder"]["layers"], strict=True):
        x_BPD, keys_values = layer.apply(
            {"params": layer_params}, x_BPD, is_local, reach, method="read"
        )
        kept.append([jnp.swapaxes(x, 1, 2) for x in keys_values])
    keys, values = zip(*kept, strict=True)
    last_B = jnp.maximum(lengths_B - 1, 0)  # A row of padding has no last token.
    x_B1D = jnp.take_along_axis(x_BPD, last_B[:, None, None], axis=1)
    return _logits(cfg, params, x_B1D), Cache(positions=lengths_B, keys=keys, values=values)


def decode_step(cfg: GPTConfig, params, cache: Cache, tokens_N):
    """Returns float32 logits [N, V] of the next token, and the cache with this one."""
    network, layer = Network(cfg), Layer(cfg)
    positions_N1 = cache.positions[:, None]
    rope, local_rope = _ropes(cfg, positions_N1)
    x_N1D = network.apply({"params": params}, tokens_N[:, None], positions_N1, method="embed")
    kept = []
    layers = params["decoder"]["layers"]
    for is_local, layer_params, own in zip(cfg.local_layers, layers, cache.own, strict=True):
        x_N1D, new = layer.apply(
            {"params": layer_params},
            x_N1D,
            local_rope if is_local and local_rope is not None else rope,
            cache.positions,
            own,
            method="step",
        )
        kept.append(new)
    return _logits(cfg, params, x_N1D), cache.stepped(kept)


def _logits(cfg: GPTConfig, params, x_N1D) -> jax.Array:
    """Returns float32 logits [N, V] of the last layer's output."""
    x_N1D = _norm(cfg).apply({"params": params["decoder"]["final_norm"]}, x_N1D)
    return Network(cfg).apply({"params": params}, x_N1D, method="unembed")[:, 0]
