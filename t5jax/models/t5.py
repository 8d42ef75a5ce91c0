"""The T5 family: encoder, decoder, and the decoder's single step.

Raffel et al. 2020 (arXiv:1910.10683), section 2.1, and the variants that `T5Config` names. Where
the paper and the released checkpoints differ, the checkpoints are followed: attention is not
scaled, norms have neither mean nor bias, nothing has a bias term.

B batch, S source length, T target length, D model, H heads, K head dim, N buckets, V vocab,
L layers.
"""

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
)
from t5jax.models.layers import MLP, Dropout, Embedding, Linear, RMSNorm, Unembedding, normal
from t5jax.sharding import constrain


class Cache(flax.struct.PyTreeNode):
    """What decoding remembers: argument and result of `T5.decode_step`.

    The decoder's own keys and values [L, B, T, H, K] grow by one position a step; those of
    cross-attention [L, B, S, H, K] and the encoder's mask [B, S] stay.
    """

    position: jax.Array  # int32 []: tokens seen so far.
    self_keys: jax.Array
    self_values: jax.Array
    cross_keys: jax.Array
    cross_values: jax.Array
    encoder_mask: jax.Array


def _norm(cfg: T5Config, name=None):
    return RMSNorm(cfg.layer_norm_epsilon, cfg.dtype, cfg.param_dtype, name=name)


def _mlp(cfg: T5Config, name=None):
    return MLP(
        cfg.d_model,
        cfg.d_ff,
        cfg.mlp_activation.removeprefix("gated-"),
        cfg.gated,
        cfg.dropout_rate,
        cfg.initializer_factor,
        cfg.dtype,
        cfg.param_dtype,
        name=name,
    )


class RelativeBias(nn.Module):
    """The learned bias of one stack, or in UMT5 of one layer."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions_T, key_positions_S):
        cfg = self.config
        init = normal(cfg.initializer_factor * cfg.d_model**-0.5, ("heads", "buckets"))
        shape = (cfg.num_heads, cfg.relative_attention_num_buckets)
        table_HN = self.param("embedding", init, shape, cfg.param_dtype)
        return relative_position_bias(
            table_HN,
            query_positions_T,
            key_positions_S,
            max_distance=cfg.relative_attention_max_distance,
            bidirectional=self.bidirectional,
        )


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
            return Linear("BTD,DHK->BTHK", (D, H, K), axes, stddev, cfg.dtype, cfg.param_dtype)

        self.query = projection((D * K) ** -0.5)
        self.key = projection(D**-0.5)
        self.value = projection(D**-0.5)
        self.out = Linear(
            "BTHK,HKD->BTD",
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
        """Returns keys and values [B, S, H, K] to keep."""
        return self.key(x_BSD), self.value(x_BSD)

    def attend(self, x_BTD, k_BSHK, v_BSHK, bias_1HTS, mask_B1TS):
        """Attends to keys and values that were kept."""
        h_BTHK = dot_product_attention(self.query(x_BTD), k_BSHK, v_BSHK, bias_1HTS, mask_B1TS)
        return self.out(h_BTHK)


class EncoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x_BSD, bias_1HSS, mask_B1SS):
        cfg = self.config
        dropout = Dropout(cfg.dropout_rate)
        if cfg.per_layer_relative_bias:
            positions_S = jnp.arange(x_BSD.shape[1])
            bias_1HSS = RelativeBias(cfg, bidirectional=True, name="relative_bias")(
                positions_S, positions_S
            )

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
            positions_T = jnp.arange(x_BTD.shape[1])
            bias_1HTT = self.relative_bias(positions_T, positions_T)

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

    def step(self, carry, bias_1H1T, mask_B11T, cross_mask_B11S, cross_keys, cross_values):
        """One token: reads and writes its layer's slice of the cache, which is carried in place."""
        x_B1D, layer, position, self_keys, self_values = carry
        if self.config.per_layer_relative_bias:
            bias_1H1T = self.relative_bias(position[None], jnp.arange(self_keys.shape[2]))

        h_B1D = self.pre_self_attention_norm(x_B1D)
        k_B1HK, v_B1HK = self.self_attention.keys_values(h_B1D)
        at = (layer, 0, position, 0, 0)
        self_keys = jax.lax.dynamic_update_slice(self_keys, k_B1HK[None], at)
        self_values = jax.lax.dynamic_update_slice(self_values, v_B1HK[None], at)
        k_BTHK = jax.lax.dynamic_index_in_dim(self_keys, layer, keepdims=False)
        v_BTHK = jax.lax.dynamic_index_in_dim(self_values, layer, keepdims=False)
        x_B1D = x_B1D + self.self_attention.attend(h_B1D, k_BTHK, v_BTHK, bias_1H1T, mask_B11T)

        h_B1D = self.pre_cross_attention_norm(x_B1D)
        x_B1D = x_B1D + self.cross_attention.attend(
            h_B1D, cross_keys, cross_values, None, cross_mask_B11S
        )
        x_B1D = x_B1D + self.mlp(self.pre_mlp_norm(x_B1D))
        return (x_B1D, layer + 1, position, self_keys, self_values), None

    def cross_keys_values(self, _, encoded_BSD):
        return None, self.cross_attention.keys_values(encoded_BSD)


def _remat(layer: type[nn.Module], cfg: T5Config) -> type[nn.Module]:
    """Returns the layer with its rematerialisation policy."""
    if cfg.remat == "none":
        return layer
    policy = None
    if cfg.remat == "minimal":
        policy = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
    # Inside a scan nothing can be merged across the layer's boundary, so CSE need not be prevented.
    return nn.remat(layer, policy=policy, prevent_cse=not cfg.scan_layers)


def _scan(layer: type[nn.Module], cfg: T5Config, length: int, **in_axes) -> type[nn.Module]:
    """Returns the stack of `length` layers: parameters stacked on a leading axis, "layers".

    Args:
      **in_axes: for each method of the layer, how its arguments after the carry are split.
    """
    common = dict(
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        unroll=1 if cfg.scan_layers else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return nn.scan(layer, methods={m: common | {"in_axes": axes} for m, axes in in_axes.items()})


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
            positions_S = jnp.arange(x_BSD.shape[1])
            bias_1HSS = RelativeBias(cfg, bidirectional=True, name="relative_bias")(
                positions_S, positions_S
            )
        Layers = _scan(
            _remat(EncoderLayer, cfg), cfg, cfg.num_encoder_layers, __call__=nn.broadcast
        )
        x_BSD, _ = Layers(cfg, name="layers")(dropout(x_BSD), bias_1HSS, mask_B1SS)
        return dropout(_norm(cfg, "final_norm")(x_BSD))


class Decoder(nn.Module):
    """The encoding and the embeddings of what was written so far, to the next tokens' [B, T, D]."""

    config: T5Config

    def setup(self):
        cfg = self.config
        Layers = _scan(
            _remat(DecoderLayer, cfg),
            cfg,
            cfg.num_decoder_layers,
            __call__=nn.broadcast,
            cross_keys_values=nn.broadcast,
            step=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
        )
        self.layers = Layers(cfg)
        self.final_norm = _norm(cfg)
        self.dropout = Dropout(cfg.dropout_rate)
        if not cfg.per_layer_relative_bias:
            self.relative_bias = RelativeBias(cfg, bidirectional=False)

    def __call__(self, x_BTD, encoded_BSD, mask_B1TT, cross_mask_B1TS):
        bias_1HTT = None
        if not self.config.per_layer_relative_bias:
            positions_T = jnp.arange(x_BTD.shape[1])
            bias_1HTT = self.relative_bias(positions_T, positions_T)
        x_BTD = self.dropout(x_BTD)
        x_BTD, _ = self.layers(x_BTD, encoded_BSD, bias_1HTT, mask_B1TT, cross_mask_B1TS)
        return self.dropout(self.final_norm(x_BTD))

    def init_cache(self, encoded_BSD, encoder_mask_BS, max_length) -> Cache:
        cfg = self.config
        _, (cross_keys, cross_values) = self.layers.cross_keys_values(None, encoded_BSD)
        shape = (cfg.num_decoder_layers, len(encoded_BSD), max_length, cfg.num_heads, cfg.d_kv)
        empty = constrain(
            jnp.zeros(shape, cfg.dtype), "layers", "batch", "length", "heads", "head_dim"
        )
        return Cache(
            position=jnp.int32(0),
            self_keys=empty,
            self_values=empty,
            cross_keys=cross_keys,
            cross_values=cross_values,
            encoder_mask=encoder_mask_BS,
        )

    def step(self, x_B1D, cache: Cache):
        positions_T = jnp.arange(cache.self_keys.shape[2])
        mask_111T = (positions_T <= cache.position)[None, None, None]
        bias_1H1T = None
        if not self.config.per_layer_relative_bias:
            bias_1H1T = self.relative_bias(cache.position[None], positions_T)
        (x_B1D, _, _, self_keys, self_values), _ = self.layers.step(
            (x_B1D, jnp.int32(0), cache.position, cache.self_keys, cache.self_values),
            bias_1H1T,
            mask_111T,
            cache.encoder_mask[:, None, None, :],
            cache.cross_keys,
            cache.cross_values,
        )
        cache = cache.replace(
            position=cache.position + 1, self_keys=self_keys, self_values=self_values
        )
        return self.final_norm(x_B1D), cache


class T5(nn.Module):
    """The whole network. `t5jax.models.api` wraps its methods as functions of parameters."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.token_embedder = Embedding(
            cfg.vocab_size, cfg.d_model, cfg.initializer_factor, cfg.dtype, cfg.param_dtype
        )
        self.encoder = Encoder(cfg)
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
        """Returns the encoding [B, S, D], and where its tokens are, bool [B, S]."""
        tokens_BS = batch[features.ENCODER_INPUT_TOKENS]
        is_token_BS = tokens_BS != self.config.pad_token_id
        mask_B1SS = is_token_BS[:, None, None, :]
        if features.ENCODER_SEGMENT_IDS in batch:
            ids_BS = batch[features.ENCODER_SEGMENT_IDS]
            mask_B1SS = segment_mask(ids_BS, ids_BS)
        x_BSD = constrain(self.token_embedder(tokens_BS), "batch", "length", "activation_embed")
        return self.encoder(x_BSD, mask_B1SS), is_token_BS

    def hidden(self, batch):
        """Returns the decoder's output [B, T, D], ready for `unembed`."""
        encoded_BSD, is_token_BS = self.encode(batch)
        tokens_BT = batch[features.DECODER_INPUT_TOKENS]
        # Padding among the decoder's inputs cannot be told from its start token, and need not be:
        # it comes last, where only padding sees it.
        mask_B1TT = causal_mask(tokens_BT.shape[1])
        cross_mask_B1TS = is_token_BS[:, None, None, :]
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

    def init_cache(self, batch, max_length):
        encoded_BSD, is_token_BS = self.encode(batch)
        return self.decoder.init_cache(encoded_BSD, is_token_BS, max_length)

    def decode_step(self, cache: Cache, tokens_B):
        """Returns float32 logits [B, V] of the next token, and the cache with this one."""
        x_B1D, cache = self.decoder.step(self.token_embedder(tokens_B[:, None]), cache)
        return self.unembed(self._scale(x_B1D))[:, 0], cache

    def _scale(self, x_BTD):
        cfg = self.config
        return x_BTD * cfg.d_model**-0.5 if cfg.scale_decoder_outputs else x_BTD
