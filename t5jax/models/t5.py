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
from t5jax.models.layers import MLP, Dropout, Embedding, Linear, RMSNorm, normal
from t5jax.sharding import constrain


class Cache(flax.struct.PyTreeNode):
    """What decoding remembers: argument and result of `T5.decode_step`.

    The decoder's own keys and values [L, B, H, T, K] grow by one position a step; those of
    cross-attention [L, B, H, S, K] and the encoder's mask [B, S] stay.
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
            return Linear(
                "BTD,DHK->BTHK", (D, H, K), axes, stddev, cfg.dtype, cfg.param_dtype
            )

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
