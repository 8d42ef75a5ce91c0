"""T5Gemma: an encoder and a decoder of Gemma 2's layers, and a decoding step.

Zhang et al. 2025 (arXiv:2504.06225). The layers are those of `t5jax/models/gpt.py`. The encoder's
are bidirectional; the decoder's have cross-attention between self-attention and MLP, without
position embeddings but with the same groups, scale and cap as self-attention.

B batch, S source length, T target length, D model, H heads, G heads of keys and values, K head dim,
V vocab.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5jax import batch as features
from t5jax.architectures import GPTConfig, T5GemmaConfig
from t5jax.models import cache as caches
from t5jax.models import gpt
from t5jax.models.attention import AttentionMask, attention, soft_cap
from t5jax.models.cache import Cache, LayerShape
from t5jax.models.layers import Dropout, Embedding, Linear, RMSNorm, Unembedding, stack
from t5jax.models.positions import rope_frequencies, rope_table
from t5jax.sharding import constrain


class DecoderReach(gpt.Reach):
    """The masks of the decoder, and the encoding."""

    encoded: jax.Array  # [B, S, D], with the encoder's width.
    cross_mask: AttentionMask


def _norm(cfg: GPTConfig):
    return RMSNorm(cfg, cfg.norm_epsilon, cfg.norm_plus_one)


class CrossAttention(nn.Module):
    """Attention with queries from the decoder, and keys and values from the encoding."""

    config: GPTConfig
    encoder_d_model: int

    def setup(self):
        cfg = self.config
        model, source = {"embed": cfg.d_model}, {"embed": self.encoder_d_model}
        heads = {"heads": cfg.num_heads, "head_dim": cfg.head_dim}
        kv_heads = {"kv_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
        self.query = Linear(cfg, model, heads, cfg.initializer_range)
        self.key = Linear(cfg, source, kv_heads, cfg.initializer_range)
        self.value = Linear(cfg, source, kv_heads, cfg.initializer_range)
        self.out = Linear(cfg, heads, model, cfg.initializer_range * (2 * cfg.num_layers) ** -0.5)
        self.dropout = Dropout(cfg.dropout_rate)
        self.scores = {"scale": cfg.query_scale, "softcap": cfg.attention_softcap}

    def __call__(self, x_BTD, encoded_BSD, mask: AttentionMask):
        """Returns [B, T, D]; the D of `encoded_BSD` is the encoder's."""
        q_BTHK = constrain(self.query(x_BTD), "batch", "length", "heads", "head_dim")
        k_BSGK, v_BSGK = (
            constrain(x, "batch", None, "kv_heads", "head_dim")
            for x in self.keys_values(encoded_BSD)
        )
        h_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, mask, **self.scores, dropout=self.dropout)
        return self.out(h_BTHK)

    def keys_values(self, encoded_BSD):
        """Returns keys and values [B, S, G, K]."""
        return self.key(encoded_BSD), self.value(encoded_BSD)

    def step(self, x_N1D, keys_NGSK, values_NGSK, mask: AttentionMask):
        """Returns [N, 1, D], for one token per row and cached keys and values."""
        q_N1HK = self.query(x_N1D)
        return self.out(attention(q_N1HK, keys_NGSK, values_NGSK, mask, **self.scores, cached=True))


class DecoderLayer(gpt.Layer):
    """Gemma 2's layer, with cross-attention between self-attention and MLP."""

    encoder_d_model: int

    def setup(self):
        super().setup()
        self.pre_cross_attention_norm = _norm(self.config)
        self.cross_attention = CrossAttention(self.config, self.encoder_d_model)
        self.post_cross_attention_norm = _norm(self.config)

    def __call__(self, x_BTD, is_local, reach):
        h_BTD, _ = self.attention(self.pre_attention_norm(x_BTD), *reach.of(is_local))
        x_BTD = self._add_attention(x_BTD, h_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")
        h_BTD = self.pre_cross_attention_norm(x_BTD)
        h_BTD = self.cross_attention(h_BTD, reach.encoded, reach.cross_mask)
        x_BTD = self._add_cross_attention(x_BTD, h_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")
        x_BTD = self._add_mlp(x_BTD)
        return constrain(x_BTD, "batch", "length", "activation_embed"), None

    def cross_keys_values(self, encoded_BSD):
        return self.cross_attention.keys_values(encoded_BSD)

    def step(self, x_N1D, cross_kept, *step):
        """The same for one token per row.

        Args:
          cross_kept: the last arguments of `CrossAttention.step`.
          step: the arguments of `gpt.Attention.step`, whose keys and values are returned.
        """
        h_N1D, kept = self.attention.step(self.pre_attention_norm(x_N1D), *step)
        x_N1D = self._add_attention(x_N1D, h_N1D)
        h_N1D = self.cross_attention.step(self.pre_cross_attention_norm(x_N1D), *cross_kept)
        x_N1D = self._add_cross_attention(x_N1D, h_N1D)
        return self._add_mlp(x_N1D), kept

    def _add_cross_attention(self, x, h):
        return x + self.dropout(self.post_cross_attention_norm(h))


class Decoder(nn.Module):
    """All layers of the decoder and the final norm."""

    config: T5GemmaConfig

    def setup(self):
        cfg = self.config.decoder
        Layers = stack(DecoderLayer, cfg, cfg.num_layers, in_axes=(0, nn.broadcast))
        self.layers = Layers(cfg, self.config.d_model)
        self.final_norm = _norm(cfg)

    def __call__(self, x_BTD, reach: DecoderReach):
        x_BTD, _ = self.layers(x_BTD, jnp.array(self.config.decoder.local_layers), reach)
        return self.final_norm(x_BTD)


class Network(nn.Module):
    """The whole network. `t5jax.models.api` wraps its methods as functions of parameters."""

    config: T5GemmaConfig

    def setup(self):
        cfg = self.config
        stddev = cfg.initializer_range
        self.encoder_embedder = Embedding(cfg, cfg.vocab_size, cfg.d_model, stddev)
        self.decoder_embedder = Embedding(cfg, cfg.vocab_size, cfg.decoder_d_model, stddev)
        self.encoder = gpt.Decoder(cfg.encoder)  # With the mask of an encoder.
        self.decoder = Decoder(cfg)
        self.dropout = Dropout(cfg.dropout_rate)
        if not cfg.tie_word_embeddings:
            self.lm_head = Unembedding(cfg, cfg.decoder_d_model, cfg.vocab_size, stddev)

    def encode(self, batch):
        """Returns the encoding [B, S, D]."""
        cfg = self.config
        tokens_BS = batch[features.ENCODER_INPUT_TOKENS]
        mask = AttentionMask(is_token_BS=_is_token(cfg, batch))
        if features.ENCODER_SEGMENT_IDS in batch:
            mask = AttentionMask.within(batch[features.ENCODER_SEGMENT_IDS])
        positions_BS = _positions(batch, features.ENCODER_POSITIONS, tokens_BS)
        # One more than in the decoder, as in transformers 5; in version 4 and Google's own code
        # there are as many.
        window = cfg.encoder.sliding_window and cfg.encoder.sliding_window + 1
        reach = gpt.Reach(mask, window, _rope(cfg.encoder, positions_BS), None)
        x_BSD = self.dropout(_scaled(self.encoder_embedder, tokens_BS))
        x_BSD = constrain(x_BSD, "batch", "length", "activation_embed")
        return self.dropout(self.encoder(x_BSD, reach))

    def hidden(self, batch):
        """Returns the decoder's output [B, T, D] for `unembed`."""
        cfg, encoded_BSD = self.config, self.encode(batch)
        tokens_BT = batch[features.DECODER_INPUT_TOKENS]
        # Padding of the decoder's inputs comes last, so that only padding attends to it.
        mask = AttentionMask(causal=True)
        cross_mask = AttentionMask(is_token_BS=_is_token(cfg, batch))
        if features.DECODER_SEGMENT_IDS in batch:
            ids_BT, ids_BS = (
                batch[features.DECODER_SEGMENT_IDS],
                batch[features.ENCODER_SEGMENT_IDS],
            )
            mask = AttentionMask.within(ids_BT, causal=True)
            cross_mask = AttentionMask(query_segments_BT=ids_BT, key_segments_BS=ids_BS)
        positions_BT = _positions(batch, features.DECODER_POSITIONS, tokens_BT)
        reach = DecoderReach(
            mask,
            cfg.decoder.sliding_window,
            _rope(cfg.decoder, positions_BT),
            None,
            encoded=encoded_BSD,
            cross_mask=cross_mask,
        )
        x_BTD = self.dropout(self.embed(tokens_BT))
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")
        return self.dropout(self.decoder(x_BTD, reach))

    def unembed(self, x_BTD):
        """Returns float32 logits [..., V] for `hidden`'s output [..., D]."""
        cfg = self.config
        tied = cfg.tie_word_embeddings
        logits = self.decoder_embedder.attend(x_BTD) if tied else self.lm_head(x_BTD)
        return logits if cfg.final_softcap is None else soft_cap(logits, cfg.final_softcap)

    def logits(self, batch):
        logits_BTV = self.unembed(self.hidden(batch))
        return constrain(logits_BTV, "batch", "length", "vocab")

    def embed(self, tokens):
        """Returns [..., D] for the decoder's tokens [...]."""
        return _scaled(self.decoder_embedder, tokens)


def _scaled(embedder: Embedding, tokens):
    """Returns embeddings times D^0.5, rounded as in the training of Gemma."""
    return embedder(tokens) * jnp.asarray(embedder.features**0.5, embedder.config.dtype)


def _is_token(cfg: T5GemmaConfig, batch):
    """Returns bool [B, S], the encoder's tokens."""
    if features.ENCODER_SEGMENT_IDS in batch:
        return batch[features.ENCODER_SEGMENT_IDS] != 0
    return batch[features.ENCODER_INPUT_TOKENS] != cfg.pad_token_id


def _positions(batch, name: str, tokens):
    """Returns int32 [B or 1, length], the position of each token in its text."""
    return batch[name] if name in batch else jnp.arange(tokens.shape[1])[None]


def _rope(cfg: GPTConfig, positions):
    return rope_table(positions, rope_frequencies(cfg.head_dim, cfg.rope_theta))


def unembed_params(cfg: T5GemmaConfig) -> tuple[str, ...]:
    """Returns the names of the parameters that `Network.unembed` reads."""
    return ("decoder_embedder",) if cfg.tie_word_embeddings else ("lm_head",)


# --- Decoding, one token at a time ---------------------------------------------------------------


def cache_layers(cfg: T5GemmaConfig) -> tuple[LayerShape, ...]:
    """Returns the shape of each layer's cache."""
    return gpt.cache_layers(cfg.decoder)


def prefill(cfg: T5GemmaConfig, params, batch) -> tuple[jax.Array, Cache]:
    """Encodes the inputs and reads the start token."""
    encoded_BSD = Network(cfg).apply({"params": params}, batch, method="encode")
    layer = DecoderLayer(cfg.decoder, cfg.d_model)
    cross = [
        layer.apply({"params": layer_params}, encoded_BSD, method="cross_keys_values")
        for layer_params in params["decoder"]["layers"]
    ]
    rows = caches.of_encoding(cache_layers(cfg), cross, _is_token(cfg, batch))
    start_B = jnp.full(len(encoded_BSD), cfg.decoder_start_token_id, jnp.int32)
    return decode_step(cfg, params, rows, start_B)


def decode_step(cfg: T5GemmaConfig, params, cache: Cache, tokens_N):
    """Returns float32 logits [N, V] of the next token, and the cache with this one."""
    network, layer = Network(cfg), DecoderLayer(cfg.decoder, cfg.d_model)
    rope = _rope(cfg.decoder, cache.positions[:, None])
    x_N1D = network.apply({"params": params}, tokens_N[:, None], method="embed")
    kept = []
    layers = params["decoder"]["layers"]
    for layer_params, own, cross in zip(layers, cache.own, cache.cross, strict=True):
        x_N1D, new = layer.apply(
            {"params": layer_params},
            x_N1D,
            (*cross, cache.cross_mask),
            rope,
            cache.positions,
            own,
            method="step",
        )
        kept.append(new)
    x_N1D = _norm(cfg.decoder).apply({"params": params["decoder"]["final_norm"]}, x_N1D)
    logits_N1V = network.apply({"params": params}, x_N1D, method="unembed")
    return logits_N1V[:, 0], cache.stepped(kept)
