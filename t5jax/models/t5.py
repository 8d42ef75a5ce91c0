"""The T5 family: encoder, decoder, and the decoder's single step.

Raffel et al. 2020 (arXiv:1910.10683), section 2.1, and the variants that `T5Config` names. Where
the paper and the released checkpoints differ, the checkpoints are followed: attention is not
scaled, norms have neither mean nor bias, nothing has a bias term.

B batch, S source length, T target length, D model, H heads, K head dim, N buckets, V vocab,
L layers.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from t5jax import batch as features
from t5jax.architectures import T5Config
from t5jax.models.attention import (
    causal_mask,
    dot_product_attention,
    relative_position_bias,
    segment_mask,
    single_query_attention,
    spread_over_diagonals,
)
from t5jax.models.layers import (
    MLP,
    Dropout,
    Embedding,
    Linear,
    RMSNorm,
    Unembedding,
    normal,
    stack,
)
from t5jax.sharding import constrain


class Cache(flax.struct.PyTreeNode):
    """What decoding remembers: argument and result of `decode_step`.

    The decoder's own keys and values [B, H, T, K] gain one position a step; those of
    cross-attention [B, H, S, K] stay. There is one array a layer, or, where the parameters are
    stacked, one for all of them with layers in front.
    """

    position: jax.Array  # int32 []: tokens seen so far.
    self_keys: Any
    self_values: Any
    cross_keys: Any
    cross_values: Any
    encoder_mask: jax.Array  # bool [B, S]: true where the encoder has a token.


def _norm(cfg: T5Config, name=None):
    return RMSNorm(cfg.layer_norm_epsilon, cfg.dtype, cfg.param_dtype, name=name)


def _mlp(cfg: T5Config, name=None):
    return MLP(
        cfg.d_model,
        cfg.d_ff,
        cfg.mlp_activation.removeprefix("gated-"),
        cfg.gated,
        cfg.dropout_rate,
        cfg.initializer_factor * cfg.d_model**-0.5,
        cfg.initializer_factor * cfg.d_ff**-0.5,
        cfg.dtype,
        cfg.param_dtype,
        name=name,
    )


class RelativeBias(nn.Module):
    """The learned bias of one stack, or in UMT5 of one layer."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, distance_R):
        """Returns float32 [H, R] for int32 distances, key position minus query position."""
        cfg = self.config
        init = normal(cfg.initializer_factor * cfg.d_model**-0.5, ("heads", "buckets"))
        shape = (cfg.num_heads, cfg.relative_attention_num_buckets)
        table_HN = self.param("embedding", init, shape, cfg.param_dtype)
        return relative_position_bias(
            table_HN,
            distance_R,
            max_distance=cfg.relative_attention_max_distance,
            bidirectional=self.bidirectional,
        )

    def matrix(self, length: int):
        """Returns float32 [1, H, T, T], for a sequence that attends to itself."""
        return spread_over_diagonals(self(jnp.arange(1 - length, length)), length)


class Attention(nn.Module):
    """Multi-head attention; queries from one sequence, keys and values from another or the same.

    The pieces are methods, so that decoding can keep keys and values between steps.
    """

    config: T5Config

    def setup(self):
        cfg = self.config
        D, H, K = cfg.d_model, cfg.num_heads, cfg.d_kv

        def projection(stddev):
            axes = ("embed", "heads", "head_dim")
            stddev *= cfg.initializer_factor
            return Linear("...D,DHK->...HK", (D, H, K), axes, stddev, cfg.dtype, cfg.param_dtype)

        self.query = projection((D * K) ** -0.5)
        self.key = projection(D**-0.5)
        self.value = projection(D**-0.5)
        self.out = Linear(
            "...HK,HKD->...D",
            (H, K, D),
            ("heads", "head_dim", "embed"),
            cfg.initializer_factor * (H * K) ** -0.5,
            cfg.dtype,
            cfg.param_dtype,
        )
        self.dropout = Dropout(cfg.dropout_rate)

    def __call__(self, x_BTD, kv_BSD, bias_1HTS, mask_B1TS):
        q_BTHK = constrain(self.query(x_BTD), "batch", "length", "heads", "head_dim")
        k_BSHK = constrain(self.key(kv_BSD), "batch", "length", "heads", "head_dim")
        v_BSHK = constrain(self.value(kv_BSD), "batch", "length", "heads", "head_dim")
        h_BTHK = dot_product_attention(
            q_BTHK, k_BSHK, v_BSHK, bias_1HTS, mask_B1TS, dropout=self.dropout
        )
        return self.out(h_BTHK)

    def keys_values(self, x_BSD):
        """Returns keys and values to keep, [B, H, S, K]."""
        return jnp.swapaxes(self.key(x_BSD), 1, 2), jnp.swapaxes(self.value(x_BSD), 1, 2)

    def attend_one(self, x_BD, k_BHTK, v_BHTK, bias_1HT, mask_BT):
        """One token attends to keys and values that were kept."""
        h_BHK = single_query_attention(self.query(x_BD), k_BHTK, v_BHTK, bias_1HT, mask_BT)
        return self.out(h_BHK)


class EncoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x_BSD, bias_1HSS, mask_B1SS):
        cfg = self.config
        dropout = Dropout(cfg.dropout_rate)
        if cfg.per_layer_relative_bias:
            bias = RelativeBias(cfg, bidirectional=True, name="relative_bias")
            bias_1HSS = bias.matrix(x_BSD.shape[1])

        h_BSD = _norm(cfg, "pre_attention_norm")(x_BSD)
        h_BSD = Attention(cfg, name="attention")(h_BSD, h_BSD, bias_1HSS, mask_B1SS)
        x_BSD = x_BSD + dropout(h_BSD)
        x_BSD = constrain(x_BSD, "batch", "length", "activation_embed")

        h_BSD = _mlp(cfg, "mlp")(_norm(cfg, "pre_mlp_norm")(x_BSD))
        x_BSD = x_BSD + dropout(h_BSD)
        return constrain(x_BSD, "batch", "length", "activation_embed"), None


class DecoderLayer(nn.Module):
    config: T5Config

    def setup(self):
        cfg = self.config
        self.pre_self_attention_norm = _norm(cfg)
        self.self_attention = Attention(cfg)
        self.pre_cross_attention_norm = _norm(cfg)
        self.cross_attention = Attention(cfg)
        self.pre_mlp_norm = _norm(cfg)
        self.mlp = _mlp(cfg)
        self.dropout = Dropout(cfg.dropout_rate)
        if cfg.per_layer_relative_bias:
            self.relative_bias = RelativeBias(cfg, bidirectional=False)

    def __call__(self, x_BTD, encoded_BSD, bias_1HTT, mask_B1TT, cross_mask_B1TS):
        if self.config.per_layer_relative_bias:
            bias_1HTT = self.relative_bias.matrix(x_BTD.shape[1])

        h_BTD = self.pre_self_attention_norm(x_BTD)
        h_BTD = self.self_attention(h_BTD, h_BTD, bias_1HTT, mask_B1TT)
        x_BTD = x_BTD + self.dropout(h_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")

        h_BTD = self.pre_cross_attention_norm(x_BTD)
        h_BTD = self.cross_attention(h_BTD, encoded_BSD, None, cross_mask_B1TS)
        x_BTD = x_BTD + self.dropout(h_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")

        h_BTD = self.mlp(self.pre_mlp_norm(x_BTD))
        x_BTD = x_BTD + self.dropout(h_BTD)
        return constrain(x_BTD, "batch", "length", "activation_embed"), None

    # Decoding calls these one after the other, and keeps the keys and values in between.

    def self_keys_values(self, x_B1D):
        return self.self_attention.keys_values(self.pre_self_attention_norm(x_B1D))

    def cross_keys_values(self, encoded_BSD):
        return self.cross_attention.keys_values(encoded_BSD)

    def step(self, x_BD, position, self_kept, cross_kept, bias_1HT, cross_mask_BS):
        """One token, whose own key and value are among the kept ones already; [B, D]."""
        positions_T = jnp.arange(self_kept[0].shape[2])
        mask_1T = (positions_T <= position)[None]
        if self.config.per_layer_relative_bias:
            bias_1HT = self.relative_bias(positions_T - position)[None]

        h_BD = self.pre_self_attention_norm(x_BD)
        x_BD = x_BD + self.self_attention.attend_one(h_BD, *self_kept, bias_1HT, mask_1T)

        h_BD = self.pre_cross_attention_norm(x_BD)
        x_BD = x_BD + self.cross_attention.attend_one(h_BD, *cross_kept, None, cross_mask_BS)
        return x_BD + self.mlp(self.pre_mlp_norm(x_BD))


class Encoder(nn.Module):
    """Tokens' embeddings [B, S, D] to the encoding [B, S, D]."""

    config: T5Config

    @nn.compact
    def __call__(self, x_BSD, mask_B1SS):
        cfg = self.config
        dropout = Dropout(cfg.dropout_rate)
        bias_1HSS = None
        if not cfg.per_layer_relative_bias:
            # Once a stack, outside the scan.
            bias = RelativeBias(cfg, bidirectional=True, name="relative_bias")
            bias_1HSS = bias.matrix(x_BSD.shape[1])
        Layers = stack(EncoderLayer, cfg, cfg.num_encoder_layers)
        x_BSD, _ = Layers(cfg, name="layers")(dropout(x_BSD), bias_1HSS, mask_B1SS)
        return dropout(_norm(cfg, "final_norm")(x_BSD))


class Decoder(nn.Module):
    """The encoding and the embeddings of what was written so far, to the next tokens' [B, T, D]."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.layers = stack(DecoderLayer, cfg, cfg.num_decoder_layers)(cfg)
        self.final_norm = _norm(cfg)
        self.dropout = Dropout(cfg.dropout_rate)
        if not cfg.per_layer_relative_bias:
            self.relative_bias = RelativeBias(cfg, bidirectional=False)

    def __call__(self, x_BTD, encoded_BSD, mask_B1TT, cross_mask_B1TS):
        bias_1HTT = None
        if not self.config.per_layer_relative_bias:
            bias_1HTT = self.relative_bias.matrix(x_BTD.shape[1])
        x_BTD = self.dropout(x_BTD)
        x_BTD, _ = self.layers(x_BTD, encoded_BSD, bias_1HTT, mask_B1TT, cross_mask_B1TS)
        return self.dropout(self.final_norm(x_BTD))


class Network(nn.Module):
    """The whole network. `t5jax.models.api` wraps its methods as functions of parameters."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.token_embedder = Embedding(
            cfg.vocab_size, cfg.d_model, cfg.initializer_factor, cfg.dtype, cfg.param_dtype
        )
        self.encoder = Encoder(cfg)
        if cfg.kind == "encoder":
            return
        self.decoder = Decoder(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = Unembedding(
                cfg.d_model,
                cfg.vocab_size,
                # N(0, 1), as Hugging Face has it, is far too large to train from.
                cfg.initializer_factor * cfg.d_model**-0.5,
                cfg.dtype,
                cfg.param_dtype,
            )

    def encode(self, batch):
        """Returns the encoding [B, S, D]."""
        tokens_BS = batch[features.ENCODER_INPUT_TOKENS]
        mask_B1SS = _is_token(self.config, batch)[:, None, None, :]
        if features.ENCODER_SEGMENT_IDS in batch:
            ids_BS = batch[features.ENCODER_SEGMENT_IDS]
            mask_B1SS = segment_mask(ids_BS, ids_BS)
        x_BSD = constrain(self.token_embedder(tokens_BS), "batch", "length", "activation_embed")
        return self.encoder(x_BSD, mask_B1SS)

    def hidden(self, batch):
        """Returns the decoder's output [B, T, D], ready for `unembed`; an encoder's, its own."""
        encoded_BSD = self.encode(batch)
        if self.config.kind == "encoder":
            return encoded_BSD
        tokens_BT = batch[features.DECODER_INPUT_TOKENS]
        # Padding among the decoder's inputs cannot be told from its start token, and need not be:
        # it comes last, where only padding sees it.
        mask_B1TT = causal_mask(tokens_BT.shape[1])
        cross_mask_B1TS = _is_token(self.config, batch)[:, None, None, :]
        if features.DECODER_SEGMENT_IDS in batch:
            ids_BT = batch[features.DECODER_SEGMENT_IDS]
            mask_B1TT &= segment_mask(ids_BT, ids_BT)
            cross_mask_B1TS = segment_mask(ids_BT, batch[features.ENCODER_SEGMENT_IDS])
        x_BTD = constrain(self.token_embedder(tokens_BT), "batch", "length", "activation_embed")
        return self._scale(self.decoder(x_BTD, encoded_BSD, mask_B1TT, cross_mask_B1TS))

    def unembed(self, x_BTD):
        """Returns float32 logits [..., V] for `hidden`'s output [..., D]."""
        if self.config.tie_word_embeddings:
            return self.token_embedder.attend(x_BTD)
        return self.lm_head(x_BTD)

    def logits(self, batch):
        logits_BTV = self.unembed(self.hidden(batch))
        return constrain(logits_BTV, "batch", "length", "vocab")

    def embed(self, tokens):
        return self.token_embedder(tokens)

    def finish(self, x_BD):
        """Returns float32 logits of the decoder's normed output."""
        return self.unembed(self._scale(x_BD))

    def _scale(self, x_BTD):
        cfg = self.config
        return x_BTD * cfg.d_model**-0.5 if cfg.scale_decoder_outputs else x_BTD


def _is_token(cfg: T5Config, batch):
    """Returns where the encoder has a token, bool [B, S]."""
    return batch[features.ENCODER_INPUT_TOKENS] != cfg.pad_token_id


def unembed_params(cfg: T5Config) -> tuple[str, ...]:
    """Returns the names of the parameters that `Network.unembed` reads."""
    if cfg.kind == "encoder":
        return ()
    return ("token_embedder",) if cfg.tie_word_embeddings else ("lm_head",)


# --- Decoding, one token at a time ---------------------------------------------------------------


def arrange_for_decoding(cfg: T5Config, params):
    """Returns the parameters as a decoding loop reads them fastest.

    Matrices have the dtype they are computed in. Unless the layers are to be scanned, each has
    arrays of its own: slices of a stack would be copied at every token.
    """
    dtype = jnp.dtype(cfg.dtype)

    def cast(path, x):
        keep = "relative_bias" in jax.tree_util.keystr(path) or path[-1].key == "scale"
        return x if keep else x.astype(dtype)

    params = jax.tree_util.tree_map_with_path(cast, params)
    if not cfg.scan_layers and isinstance(params["decoder"]["layers"], dict):
        layers = params["decoder"]["layers"]
        split = tuple(
            jax.tree.map(lambda x, i=i: x[i], layers) for i in range(cfg.num_decoder_layers)
        )
        params = params | {"decoder": params["decoder"] | {"layers": split}}
    return params


def prefill(cfg: T5Config, params, batch, max_length: int) -> tuple[jax.Array, Cache]:
    """Encodes the inputs, reads the start token, and makes room for `max_length` tokens."""
    cache = _init_cache(cfg, params, batch, max_length)
    batch_size = batch[features.ENCODER_INPUT_TOKENS].shape[0]
    start_B = jnp.full((batch_size,), cfg.decoder_start_token_id, jnp.int32)
    return decode_step(cfg, params, cache, start_B)


def _init_cache(cfg: T5Config, params, batch, max_length: int) -> Cache:
    encoded_BSD = Network(cfg).apply({"params": params}, batch, method="encode")
    layer, layers = DecoderLayer(cfg), params["decoder"]["layers"]

    def cross(params):
        return layer.apply({"params": params}, encoded_BSD, method="cross_keys_values")

    if isinstance(layers, tuple):
        cross_keys, cross_values = zip(*map(cross, layers), strict=True)
    else:
        cross_keys, cross_values = jax.lax.map(cross, layers)
    # Else the compiler moves their transposition into the loop over tokens.
    cross_keys, cross_values = jax.lax.optimization_barrier((cross_keys, cross_values))

    def empty(kept):
        return jnp.zeros((*kept.shape[:-2], max_length, kept.shape[-1]), kept.dtype)

    return Cache(
        position=jnp.int32(0),
        self_keys=jax.tree.map(empty, cross_keys),
        self_values=jax.tree.map(empty, cross_keys),
        cross_keys=cross_keys,
        cross_values=cross_values,
        encoder_mask=_is_token(cfg, batch),
    )


def decode_step(cfg: T5Config, params, cache: Cache, tokens_B):
    """Returns float32 logits [B, V] of the next token, and the cache with this one."""
    network, layer = Network(cfg), DecoderLayer(cfg)
    decoder, position = params["decoder"], cache.position
    bias_1HT = None
    if not cfg.per_layer_relative_bias:
        positions_T = jnp.arange(jax.tree.leaves(cache.self_keys)[0].shape[-2])
        bias = RelativeBias(cfg, bidirectional=False)
        bias_HT = bias.apply({"params": decoder["relative_bias"]}, positions_T - position)
        bias_1HT = bias_HT[None]

    def one(carry, index, params):
        x_BD, keys, values = carry
        k_BH1K, v_BH1K = layer.apply({"params": params}, x_BD[:, None], method="self_keys_values")
        # Written first and read then: the other way round, the compiler copies the cache.
        keys = _write(keys, index, position, k_BH1K)
        values = _write(values, index, position, v_BH1K)
        x_BD = layer.apply(
            {"params": params},
            x_BD,
            position,
            (_read(keys, index), _read(values, index)),
            (_read(cache.cross_keys, index), _read(cache.cross_values, index)),
            bias_1HT,
            cache.encoder_mask,
            method="step",
        )
        return x_BD, keys, values

    x_BD = network.apply({"params": params}, tokens_B, method="embed")
    carry, layers = (x_BD, cache.self_keys, cache.self_values), decoder["layers"]
    if isinstance(layers, tuple):
        for index, layer_params in enumerate(layers):
            carry = one(carry, index, layer_params)
    else:
        # The cache is carried, not scanned over: as an input and output of the scan it would be
        # copied at every token.
        indices = jnp.arange(cfg.num_decoder_layers)
        carry, _ = jax.lax.scan(lambda c, xs: (one(c, *xs), None), carry, (indices, layers))
    x_BD, keys, values = carry

    x_BD = _norm(cfg).apply({"params": decoder["final_norm"]}, x_BD)
    logits_BV = network.apply({"params": params}, x_BD, method="finish")
    return logits_BV, cache.replace(position=position + 1, self_keys=keys, self_values=values)


def _read(kept, layer):
    """Returns one layer's [B, H, T, K] of a tuple of them, or of a stack."""
    if isinstance(kept, tuple):
        return kept[layer]
    return jax.lax.dynamic_index_in_dim(kept, layer, keepdims=False)


def _write(kept, layer, position, new_BH1K):
    """Returns what is kept with one layer's key or value at a position."""
    if isinstance(kept, tuple):
        one = jax.lax.dynamic_update_slice(kept[layer], new_BH1K, (0, 0, position, 0))
        return (*kept[:layer], one, *kept[layer + 1 :])
    return jax.lax.dynamic_update_slice(kept, new_BH1K[None], (layer, 0, 0, position, 0))
