"""The T5 family: encoder, decoder, and a decoding step.

Raffel et al. 2020 (arXiv:1910.10683), section 2.1, and the variants that `T5Config` names. If the
paper and the released checkpoints differ, this follows the checkpoints: attention is not scaled,
norms have neither mean nor bias, and there are no bias terms.

B batch, S source length, T target length, D model, H heads, K head dim, N buckets, V vocab,
L layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5jax import batch as features
from t5jax.architectures import T5Config
from t5jax.models import cache as caches
from t5jax.models.attention import AttentionMask, attention, shared_bias
from t5jax.models.cache import Cache, LayerShape
from t5jax.models.layers import (
    MLP,
    Dropout,
    Embedding,
    Linear,
    RMSNorm,
    Unembedding,
    layers_apart,
    normal,
    stack,
)
from t5jax.models.positions import relative_position_bias
from t5jax.sharding import constrain


def _norm(cfg: T5Config, name=None):
    return RMSNorm(cfg, cfg.layer_norm_epsilon, name=name)


def _mlp(cfg: T5Config, name=None):
    return MLP(
        cfg,
        cfg.mlp_activation,
        wi_stddev=cfg.initializer_factor * cfg.d_model**-0.5,
        wo_stddev=cfg.initializer_factor * cfg.d_ff**-0.5,
        dropout_rate=cfg.dropout_rate,
        name=name,
    )


class RelativeBias(nn.Module):
    """The relative position bias of a stack, or in UMT5 of a layer."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, distance_R):
        """Returns float32 [H, R] for int32 distances, the key position minus the query position."""
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

    def within(self, length: int):
        """Returns the bias of self-attention, for one layer or all: see `shared_bias`."""
        return shared_bias(self(jnp.arange(1 - length, length)), length)

    def rows(self, positions_N, length: int):
        """Returns float32 [N, H, 1, S], for one query per row and keys from the start of its row.

        Args:
          positions_N: int32, the query's position in its row.
          length: S.
        """
        bias_HR = self(jnp.arange(1 - length, length))

        def one(position):
            shape = (len(bias_HR), length)
            return jax.lax.dynamic_slice(bias_HR, (0, length - 1 - position), shape)

        return jax.vmap(one)(positions_N)[:, :, None]


class Attention(nn.Module):
    """Multi-head self- or cross-attention.

    The parts are separate methods, so that decoding can cache keys and values.
    """

    config: T5Config

    def setup(self):
        cfg = self.config
        model = {"embed": cfg.d_model}
        heads = {"heads": cfg.num_heads, "head_dim": cfg.d_kv}

        def linear(inputs, outputs, stddev):
            return Linear(cfg, inputs, outputs, cfg.initializer_factor * stddev)

        self.query = linear(model, heads, (cfg.d_model * cfg.d_kv) ** -0.5)
        self.key = linear(model, heads, cfg.d_model**-0.5)
        self.value = linear(model, heads, cfg.d_model**-0.5)
        self.out = linear(heads, model, (cfg.num_heads * cfg.d_kv) ** -0.5)
        self.dropout = Dropout(cfg.dropout_rate)

    def __call__(self, x_BTD, kv_BSD, mask: AttentionMask, bias=None):
        """Returns [B, T, D]."""
        q_BTHK = constrain(self.query(x_BTD), "batch", "length", "heads", "head_dim")
        # Every query sees all keys.
        k_BSHK, v_BSHK = (
            constrain(x, "batch", None, "heads", "head_dim") for x in self.keys_values(kv_BSD)
        )
        h_BTHK = attention(q_BTHK, k_BSHK, v_BSHK, mask, bias=bias, dropout=self.dropout)
        return self.out(h_BTHK)

    def keys_values(self, x_BSD):
        """Returns keys and values [B, S, H, K]."""
        return self.key(x_BSD), self.value(x_BSD)

    def read_cache(self, x_N1D, keys_NHSK, values_NHSK, mask: AttentionMask, bias_NH1S=None):
        """Returns [N, 1, D], for one token per row and cached keys and values."""
        q_N1HK = self.query(x_N1D)
        h_N1HK = attention(q_N1HK, keys_NHSK, values_NHSK, mask, bias=bias_NH1S, cached=True)
        return self.out(h_N1HK)


class EncoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x_BSD, bias, mask: AttentionMask):
        cfg = self.config
        dropout = Dropout(cfg.dropout_rate)
        if cfg.per_layer_relative_bias:
            relative_bias = RelativeBias(cfg, bidirectional=True, name="relative_bias")
            bias = relative_bias.within(x_BSD.shape[1])

        h_BSD = _norm(cfg, "pre_attention_norm")(x_BSD)
        h_BSD = Attention(cfg, name="attention")(h_BSD, h_BSD, mask, bias)
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

    def __call__(self, x_BTD, encoded_BSD, bias, mask, cross_mask):
        if self.config.per_layer_relative_bias:
            bias = self.relative_bias.within(x_BTD.shape[1])

        h_BTD = self.pre_self_attention_norm(x_BTD)
        h_BTD = self.self_attention(h_BTD, h_BTD, mask, bias)
        x_BTD = x_BTD + self.dropout(h_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")

        h_BTD = self.pre_cross_attention_norm(x_BTD)
        h_BTD = self.cross_attention(h_BTD, encoded_BSD, cross_mask)
        x_BTD = x_BTD + self.dropout(h_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")

        h_BTD = self.mlp(self.pre_mlp_norm(x_BTD))
        x_BTD = x_BTD + self.dropout(h_BTD)
        return constrain(x_BTD, "batch", "length", "activation_embed"), None

    def cross_keys_values(self, encoded_BSD):
        return self.cross_attention.keys_values(encoded_BSD)

    def step(self, x_N1D, positions_N, kept, cross_kept, cross_mask, bias_NH1S):
        """The same for one token per row.

        Args:
          x_N1D: the token.
          positions_N: its position in its row.
          kept: the keys and values [N, H, S, K] of this layer's self-attention.
          cross_kept: those of its cross-attention.
          cross_mask: the mask of cross-attention.
          bias_NH1S: the position bias.
        Returns:
          [N, 1, D], and `kept` with the token's key and value.
        """
        h_N1D = self.pre_self_attention_norm(x_N1D)
        k_N1HK, v_N1HK = self.self_attention.keys_values(h_N1D)
        *kept, mask = caches.extend(*kept, k_N1HK[:, 0], v_N1HK[:, 0], positions_N)
        if self.config.per_layer_relative_bias:
            bias_NH1S = self.relative_bias.rows(positions_N, kept[0].shape[2])
        x_N1D = x_N1D + self.self_attention.read_cache(h_N1D, *kept, mask, bias_NH1S)

        h_N1D = self.pre_cross_attention_norm(x_N1D)
        x_N1D = x_N1D + self.cross_attention.read_cache(h_N1D, *cross_kept, cross_mask)
        return x_N1D + self.mlp(self.pre_mlp_norm(x_N1D)), kept


class Encoder(nn.Module):
    """Maps embeddings [B, S, D] to the encoding [B, S, D]."""

    config: T5Config

    @nn.compact
    def __call__(self, x_BSD, mask: AttentionMask):
        cfg = self.config
        dropout = Dropout(cfg.dropout_rate)
        bias = None
        if not cfg.per_layer_relative_bias:
            # Once per stack, outside the scan.
            relative_bias = RelativeBias(cfg, bidirectional=True, name="relative_bias")
            bias = relative_bias.within(x_BSD.shape[1])
        if (layers := layers_apart(self)) is not None:
            for own in layers:
                x_BSD, _ = EncoderLayer(cfg, parent=None).apply({"params": own}, x_BSD, bias, mask)
        else:
            Layers = stack(EncoderLayer, cfg, cfg.num_encoder_layers)
            x_BSD, _ = Layers(cfg, name="layers")(dropout(x_BSD), bias, mask)
        return dropout(_norm(cfg, "final_norm")(x_BSD))


class Decoder(nn.Module):
    """Maps embeddings of the decoder's inputs and the encoding to the output [B, T, D]."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.layers = stack(DecoderLayer, cfg, cfg.num_decoder_layers)(cfg)
        self.final_norm = _norm(cfg)
        self.dropout = Dropout(cfg.dropout_rate)
        if not cfg.per_layer_relative_bias:
            self.relative_bias = RelativeBias(cfg, bidirectional=False)

    def __call__(self, x_BTD, encoded_BSD, mask, cross_mask):
        bias = None
        if not self.config.per_layer_relative_bias:
            bias = self.relative_bias.within(x_BTD.shape[1])
        x_BTD = self.dropout(x_BTD)
        x_BTD, _ = self.layers(x_BTD, encoded_BSD, bias, mask, cross_mask)
        return self.dropout(self.final_norm(x_BTD))


class Network(nn.Module):
    """The whole network. `t5jax.models.api` wraps its methods as functions of parameters."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.token_embedder = Embedding(
            cfg, cfg.vocab_size, cfg.d_model, stddev=cfg.initializer_factor
        )
        self.encoder = Encoder(cfg)
        if cfg.kind == "encoder":
            return
        self.decoder = Decoder(cfg)
        if not cfg.tie_word_embeddings:
            # N(0, 1), as in Hugging Face, is far too large for training.
            stddev = cfg.initializer_factor * cfg.d_model**-0.5
            self.lm_head = Unembedding(cfg, cfg.d_model, cfg.vocab_size, stddev)

    def encode(self, batch):
        """Returns the encoding [B, S, D]."""
        encoded_BSD, _ = self.read(batch)
        start = encoded_BSD.shape[1] - batch[features.ENCODER_INPUT_TOKENS].shape[1]
        return encoded_BSD[:, start:] if start else encoded_BSD

    def read(self, batch):
        """Returns the encoding [B, S, D], and the marks of tokens, [B, S]: segment ids if the batch
        has them, otherwise bool.

        With a soft prompt (arXiv:2104.08691) both begin with it, and S is as much longer. It is a
        parameter that `t5jax.adapters` makes, and lies before the first token, as if its vectors
        were those of tokens of the first segment.
        """
        tokens_BS = batch[features.ENCODER_INPUT_TOKENS]
        x_BSD, marks_BS = self.token_embedder(tokens_BS), _is_token(self.config, batch)
        is_segmented = features.ENCODER_SEGMENT_IDS in batch
        if is_segmented:
            marks_BS = batch[features.ENCODER_SEGMENT_IDS]
        if self.has_variable("params", "soft_prompt"):
            prompt_PD = self.variables["params"]["soft_prompt"]["embedding"].astype(x_BSD.dtype)
            prompt_BPD = jnp.broadcast_to(prompt_PD, (len(x_BSD), *prompt_PD.shape))
            x_BSD = jnp.concatenate([prompt_BPD, x_BSD], axis=1)
            ones_BP = jnp.ones(prompt_BPD.shape[:2], marks_BS.dtype)
            marks_BS = jnp.concatenate([ones_BP, marks_BS], axis=1)
        mask = AttentionMask(is_token_BS=marks_BS)
        if is_segmented:
            mask = AttentionMask.within(marks_BS)
        x_BSD = constrain(x_BSD, "batch", "length", "activation_embed")
        return self.encoder(x_BSD, mask), marks_BS

    def hidden(self, batch):
        """Returns the decoder's output [B, T, D] for `unembed`; of an encoder-only network, its
        own."""
        if self.config.kind == "encoder":
            return self.encode(batch)
        encoded_BSD, marks_BS = self.read(batch)
        tokens_BT = batch[features.DECODER_INPUT_TOKENS]
        # Padding of the decoder's inputs may have the same id as its start token. It need not be
        # masked: it comes last, so that only padding attends to it.
        mask = AttentionMask(causal=True)
        cross_mask = AttentionMask(is_token_BS=_are_tokens(marks_BS))
        if features.DECODER_SEGMENT_IDS in batch:
            ids_BT = batch[features.DECODER_SEGMENT_IDS]
            mask = AttentionMask.within(ids_BT, causal=True)
            cross_mask = AttentionMask(query_segments_BT=ids_BT, key_segments_BS=marks_BS)
        x_BTD = constrain(self.token_embedder(tokens_BT), "batch", "length", "activation_embed")
        return self._scale(self.decoder(x_BTD, encoded_BSD, mask, cross_mask))

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

    def finish(self, x):
        """Returns float32 logits of the decoder's normalized output."""
        return self.unembed(self._scale(x))

    def _scale(self, x_BTD):
        cfg = self.config
        return x_BTD * cfg.d_model**-0.5 if cfg.scale_decoder_outputs else x_BTD


def _is_token(cfg: T5Config, batch):
    """Returns bool [B, S], the encoder's tokens."""
    if features.ENCODER_SEGMENT_IDS in batch:
        return batch[features.ENCODER_SEGMENT_IDS] != 0
    return batch[features.ENCODER_INPUT_TOKENS] != cfg.pad_token_id


def _are_tokens(marks_BS):
    """Returns bool [B, S] for `Network.read`'s marks."""
    return marks_BS if marks_BS.dtype == bool else marks_BS != 0


def unembed_params(cfg: T5Config) -> tuple[str, ...]:
    """Returns the names of the parameters that `Network.unembed` reads."""
    if cfg.kind == "encoder":
        return ()
    return ("token_embedder",) if cfg.tie_word_embeddings else ("lm_head",)


# --- Decoding, one token at a time ---------------------------------------------------------------


def cache_layers(cfg: T5Config) -> tuple[LayerShape, ...]:
    """Returns the shape of each layer's cache."""
    shape = LayerShape(cfg.num_heads, cfg.d_kv, heads_axis="heads")
    return (shape,) * cfg.num_decoder_layers


def prefill(cfg: T5Config, params, batch) -> tuple[jax.Array, Cache]:
    """Encodes the inputs and reads the start token."""
    encoded_BSD, marks_BS = Network(cfg).apply({"params": params}, batch, method="read")
    layer = DecoderLayer(cfg)
    cross = [
        layer.apply({"params": layer_params}, encoded_BSD, method="cross_keys_values")
        for layer_params in params["decoder"]["layers"]
    ]
    rows = caches.of_encoding(cache_layers(cfg), cross, _are_tokens(marks_BS))
    start_B = jnp.full(len(encoded_BSD), cfg.decoder_start_token_id, jnp.int32)
    return decode_step(cfg, params, rows, start_B)


def decode_step(cfg: T5Config, params, cache: Cache, tokens_N):
    """Returns float32 logits [N, V] of the next token, and the cache with this one."""
    network, layer = Network(cfg), DecoderLayer(cfg)
    decoder = params["decoder"]
    bias_NH1S = None
    if not cfg.per_layer_relative_bias:
        bias = RelativeBias(cfg, bidirectional=False)
        variables = {"params": decoder["relative_bias"]}
        length = cache.keys[0].shape[2]
        bias_NH1S = bias.apply(variables, cache.positions, length, method="rows")

    x_N1D = network.apply({"params": params}, tokens_N[:, None], method="embed")
    kept = []
    for layer_params, own, cross in zip(decoder["layers"], cache.own, cache.cross, strict=True):
        x_N1D, new = layer.apply(
            {"params": layer_params},
            x_N1D,
            cache.positions,
            own,
            cross,
            cache.cross_mask,
            bias_NH1S,
            method="step",
        )
        kept.append(new)
    x_N1D = _norm(cfg).apply({"params": decoder["final_norm"]}, x_N1D)
    logits_N1V = network.apply({"params": params}, x_N1D, method="finish")
    return logits_N1V[:, 0], cache.stepped(kept)
