"""T5Gemma: an encoder and a decoder of Gemma 2's layers, and the decoder's single step.

Zhang et al. 2025 (arXiv:2504.06225). The layers are those of `t5jax/models/gpt.py`. The encoder's
see in both directions; the decoder's have cross-attention between self-attention and MLP, which
knows no positions, but has the groups, the scale and the cap of all the other attention.

B batch, S source length, T target length, D model, H heads, G heads of keys and values, K head dim,
V vocab.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from t5jax import batch as features
from t5jax.architectures import GPTConfig, T5GemmaConfig
from t5jax.models import gpt
from t5jax.models.attention import (
    causal_mask,
    grouped_query_attention,
    grouped_single_query_attention,
    rope_frequencies,
    rope_table,
    segment_mask,
    soft_cap,
    window_mask,
)
from t5jax.models.layers import Dropout, Embedding, Linear, RMSNorm, Unembedding, stack
from t5jax.sharding import constrain


class DecoderReach(gpt.Reach):
    """What the decoder's tokens see, the encoding among it."""

    encoded: jax.Array  # [B, S, D], of the encoder's width.
    cross_mask: jax.Array  # bool [B, 1, 1 or T, S].


class Cache(flax.struct.PyTreeNode):
    """What decoding remembers: argument and result of `decode_step`.

    Each layer has keys and values of its own: the decoder's [B, G, T, K], in which token i stands
    at place i % T, so that a local layer's newest takes the place of the oldest; and those of
    cross-attention [B, G, S, K], which stay.
    """

    index: jax.Array  # int32 []: tokens seen so far.
    self_keys: tuple[jax.Array, ...]
    self_values: tuple[jax.Array, ...]
    cross_keys: tuple[jax.Array, ...]
    cross_values: tuple[jax.Array, ...]
    encoder_mask: jax.Array  # bool [B, S]: true where the encoder has a token.


def _norm(cfg: GPTConfig):
    return RMSNorm(cfg.norm_epsilon, cfg.dtype, cfg.param_dtype, cfg.norm_plus_one)


class CrossAttention(nn.Module):
    """Queries of the decoder's width, keys and values of the encoding's."""

    config: GPTConfig
    encoder_d_model: int

    def setup(self):
        cfg = self.config
        D, H, G, K = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        kinds = (cfg.dtype, cfg.param_dtype)

        def projection(width, heads, axis):
            axes = ("embed", axis, "head_dim")
            return Linear("...D,DHK->...HK", (width, heads, K), axes, cfg.initializer_range, *kinds)

        self.query = projection(D, H, "heads")
        self.key = projection(self.encoder_d_model, G, "kv_heads")
        self.value = projection(self.encoder_d_model, G, "kv_heads")
        out_stddev = cfg.initializer_range * (2 * cfg.num_layers) ** -0.5
        axes = ("heads", "head_dim", "embed")
        self.out = Linear("...HK,HKD->...D", (H, K, D), axes, out_stddev, *kinds)
        self.dropout = Dropout(cfg.dropout_rate)
        self.scores = {"scale": cfg.query_scale, "softcap": cfg.attention_softcap}

    def __call__(self, x_BTD, encoded_BSD, mask_B1TS):
        """Returns [B, T, D]; the D of what it reads is the encoder's."""
        q_BTHK = constrain(self.query(x_BTD), "batch", "length", "heads", "head_dim")
        k_BSGK = constrain(self.key(encoded_BSD), "batch", "length", "kv_heads", "head_dim")
        v_BSGK = constrain(self.value(encoded_BSD), "batch", "length", "kv_heads", "head_dim")
        h_BTHK = grouped_query_attention(
            q_BTHK, k_BSGK, v_BSGK, mask_B1TS, **self.scores, dropout=self.dropout
        )
        return self.out(h_BTHK)

    def keys_values(self, encoded_BSD):
        """Returns keys and values to keep, [B, G, S, K]."""
        return jnp.swapaxes(self.key(encoded_BSD), 1, 2), jnp.swapaxes(
            self.value(encoded_BSD), 1, 2
        )

    def step(self, x_BD, keys_BGSK, values_BGSK, mask_BS):
        """Returns [B, D]: what one token sees of what was kept."""
        q_BHK = self.query(x_BD)
        return self.out(
            grouped_single_query_attention(q_BHK, keys_BGSK, values_BGSK, mask_BS, **self.scores)
        )


class DecoderLayer(gpt.Layer):
    """Gemma 2's layer, with cross-attention as a third branch between the two."""

    encoder_d_model: int

    def setup(self):
        super().setup()
        self.pre_cross_attention_norm = _norm(self.config)
        self.cross_attention = CrossAttention(self.config, self.encoder_d_model)
        self.post_cross_attention_norm = _norm(self.config)

    def __call__(self, x_BTD, is_local, reach):
        h_BTD, *_ = self.attention(self.pre_attention_norm(x_BTD), *reach.of(is_local))
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

    def step(self, x_BD, cross_kept, *kept):
        """The same for one token.

        Args:
          cross_kept: the last arguments of `CrossAttention.step`.
          kept: those of `gpt.Attention.step`, whose keys and values are returned.
        """
        h_BD, keys, values = self.attention.step(self.pre_attention_norm(x_BD), *kept)
        x_BD = self._add_attention(x_BD, h_BD)
        h_BD = self.cross_attention.step(self.pre_cross_attention_norm(x_BD), *cross_kept)
        x_BD = self._add_cross_attention(x_BD, h_BD)
        return self._add_mlp(x_BD), keys, values

    def _add_cross_attention(self, x, h):
        return x + self.dropout(self.post_cross_attention_norm(h))


class Decoder(nn.Module):
    """All layers of the decoder, and the norm behind them."""

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
        kinds = (cfg.initializer_range, cfg.dtype, cfg.param_dtype)
        self.encoder_embedder = Embedding(cfg.vocab_size, cfg.d_model, *kinds)
        self.decoder_embedder = Embedding(cfg.vocab_size, cfg.decoder_d_model, *kinds)
        self.encoder = gpt.Decoder(cfg.encoder)  # What it sees makes it an encoder.
        self.decoder = Decoder(cfg)
        self.dropout = Dropout(cfg.dropout_rate)
        if not cfg.tie_word_embeddings:
            self.lm_head = Unembedding(cfg.decoder_d_model, cfg.vocab_size, *kinds)

    def encode(self, batch):
        """Returns the encoding [B, S, D]."""
        cfg = self.config
        tokens_BS = batch[features.ENCODER_INPUT_TOKENS]
        mask_B1SS = _is_token(cfg, batch)[:, None, None, :]
        if features.ENCODER_SEGMENT_IDS in batch:
            ids_BS = batch[features.ENCODER_SEGMENT_IDS]
            mask_B1SS = segment_mask(ids_BS, ids_BS)
        positions_BS = _positions(batch, features.ENCODER_POSITIONS, tokens_BS)
        # One more than in the decoder, as in transformers 5; version 4 and Google's own code have
        # as many.
        window = cfg.sliding_window and cfg.sliding_window + 1
        reach = gpt.Reach(*_reach(cfg.encoder, mask_B1SS, window, positions_BS))
        x_BSD = self.dropout(_scaled(self.encoder_embedder, tokens_BS))
        x_BSD = constrain(x_BSD, "batch", "length", "activation_embed")
        return self.dropout(self.encoder(x_BSD, reach))

    def hidden(self, batch):
        """Returns the decoder's output [B, T, D], ready for `unembed`."""
        cfg, encoded_BSD = self.config, self.encode(batch)
        tokens_BT = batch[features.DECODER_INPUT_TOKENS]
        # Padding among the decoder's inputs comes last, where only padding sees it.
        mask_B1TT = causal_mask(tokens_BT.shape[1])
        cross_mask_B1TS = _is_token(cfg, batch)[:, None, None, :]
        if features.DECODER_SEGMENT_IDS in batch:
            ids_BT = batch[features.DECODER_SEGMENT_IDS]
            mask_B1TT &= segment_mask(ids_BT, ids_BT)
            cross_mask_B1TS = segment_mask(ids_BT, batch[features.ENCODER_SEGMENT_IDS])
        positions_BT = _positions(batch, features.DECODER_POSITIONS, tokens_BT)
        own = _reach(cfg.decoder, mask_B1TT, cfg.sliding_window, positions_BT)
        x_BTD = self.dropout(self.embed(tokens_BT))
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")
        reach = DecoderReach(*own, encoded=encoded_BSD, cross_mask=cross_mask_B1TS)
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
    """Returns embeddings times D^0.5, which is rounded as Gemma was trained."""
    return embedder(tokens) * jnp.asarray(embedder.features**0.5, embedder.dtype)


def _is_token(cfg: T5GemmaConfig, batch):
    """Returns where the encoder has a token, bool [B, S]."""
    return batch[features.ENCODER_INPUT_TOKENS] != cfg.pad_token_id


def _positions(batch, name: str, tokens):
    """Returns int32 [B or 1, length]: where each token stands in its text."""
    return batch[name] if name in batch else jnp.arange(tokens.shape[1])[None]


def _reach(cfg: GPTConfig, mask, window: int | None, positions) -> tuple:
    """Returns the fields of `gpt.Reach` for the tokens of one side."""
    local_mask = None
    if any(cfg.local_layers):
        # Distances in a row: inside one text they are those of positions.
        local_mask = mask & window_mask(positions.shape[1], window)
    return mask, local_mask, _rope(cfg, positions), None


def _rope(cfg: GPTConfig, positions):
    return rope_table(positions, rope_frequencies(cfg.head_dim, cfg.rope_theta))


def unembed_params(cfg: T5GemmaConfig) -> tuple[str, ...]:
    """Returns the names of the parameters that `Network.unembed` reads."""
    return ("decoder_embedder",) if cfg.tie_word_embeddings else ("lm_head",)


# --- Decoding, one token at a time ---------------------------------------------------------------


def arrange_for_decoding(cfg: T5GemmaConfig, params):
    """Returns the parameters as a decoding loop reads them fastest: as `gpt` has it."""
    return gpt.arrange_for_decoding(cfg.decoder, params)


def prefill(cfg: T5GemmaConfig, params, batch, max_length: int) -> tuple[jax.Array, Cache]:
    """Encodes the inputs, reads the start token, and makes room for `max_length` tokens."""
    params = arrange_for_decoding(cfg, params)
    encoded_BSD = Network(cfg).apply({"params": params}, batch, method="encode")
    layer = DecoderLayer(cfg.decoder, cfg.d_model)
    cross = [
        layer.apply({"params": layer_params}, encoded_BSD, method="cross_keys_values")
        for layer_params in params["decoder"]["layers"]
    ]
    # Else the compiler moves their transposition into the loop over tokens.
    cross_keys, cross_values = jax.lax.optimization_barrier(tuple(zip(*cross, strict=True)))

    def empty():
        return tuple(
            jnp.zeros(
                (
                    *kept.shape[:2],
                    min(max_length, cfg.sliding_window) if is_local else max_length,
                    kept.shape[-1],
                ),
                kept.dtype,
            )
            for kept, is_local in zip(cross_keys, cfg.decoder.local_layers, strict=True)
        )

    cache = Cache(
        index=jnp.int32(0),
        self_keys=empty(),
        self_values=empty(),
        cross_keys=cross_keys,
        cross_values=cross_values,
        encoder_mask=_is_token(cfg, batch),
    )
    start_B = jnp.full((len(encoded_BSD),), cfg.decoder_start_token_id, jnp.int32)
    return decode_step(cfg, params, cache, start_B)


def decode_step(cfg: T5GemmaConfig, params, cache: Cache, tokens_B):
    """Returns float32 logits [B, V] of the next token, and the cache with this one."""
    params = arrange_for_decoding(cfg, params)
    network, layer = Network(cfg), DecoderLayer(cfg.decoder, cfg.d_model)
    rope = _rope(cfg.decoder, cache.index[None, None])
    x_BD = network.apply({"params": params}, tokens_B, method="embed")
    keys, values = [], []
    for layer_params, keys_BGTK, values_BGTK, *cross_kept in zip(
        params["decoder"]["layers"],
        cache.self_keys,
        cache.self_values,
        cache.cross_keys,
        cache.cross_values,
        strict=True,
    ):
        size = keys_BGTK.shape[2]
        # The token that stands at each place; before the first one, a negative index.
        held_T = cache.index - (cache.index - jnp.arange(size)) % size
        x_BD, new_keys, new_values = layer.apply(
            {"params": layer_params},
            x_BD,
            (*cross_kept, cache.encoder_mask),
            keys_BGTK,
            values_BGTK,
            cache.index % size,
            held_T[None] >= 0,
            rope,
            method="step",
        )
        keys.append(new_keys)
        values.append(new_values)
    x_BD = _norm(cfg.decoder).apply({"params": params["decoder"]["final_norm"]}, x_BD)
    logits_BV = network.apply({"params": params}, x_BD, method="unembed")
    cache = cache.replace(index=cache.index + 1, self_keys=tuple(keys), self_values=tuple(values))
    return logits_BV, cache
