"""BERT: an encoder with post-norm layers, and its heads.

Devlin et al. 2019 (arXiv:1810.04805), and the released checkpoints. Differences: dropout draws one
mask for all positions of a row (`layers.Dropout`); sequence classification pools at every position,
so that packed rows work, although only the first position of each text is used.

B batch, S length, D model, H heads, K head dim, V vocab or classes.
"""

import flax.linen as nn
import jax.numpy as jnp

from t5jax import batch as features
from t5jax.architectures import BertConfig
from t5jax.models.attention import AttentionMask, attention
from t5jax.models.layers import (
    ACTIVATIONS,
    MLP,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Unembedding,
    float32_for,
    stack,
)
from t5jax.sharding import constrain


def _norm(cfg: BertConfig, name=None):
    return LayerNorm(cfg, cfg.layer_norm_epsilon, name=name)


def _linear(cfg: BertConfig, inputs, outputs):
    return Linear(cfg, inputs, outputs, cfg.initializer_range, use_bias=True)


def _dense(cfg: BertConfig):
    """Returns a linear map from the residual stream to itself."""
    return _linear(cfg, {"embed": cfg.d_model}, {"activation_embed": cfg.d_model})


class Attention(nn.Module):
    """Bidirectional self-attention."""

    config: BertConfig

    def setup(self):
        cfg = self.config
        model = {"embed": cfg.d_model}
        heads = {"heads": cfg.num_heads, "head_dim": cfg.head_dim}
        self.query, self.key, self.value = (_linear(cfg, model, heads) for _ in range(3))
        self.out = _linear(cfg, heads, model)
        self.dropout = Dropout(cfg.dropout_rate)

    def __call__(self, x_BSD, mask: AttentionMask):
        q_BSHK = constrain(self.query(x_BSD), "batch", "length", "heads", "head_dim")
        k_BSHK, v_BSHK = (
            constrain(project(x_BSD), "batch", None, "heads", "head_dim")
            for project in (self.key, self.value)
        )
        scale = self.config.head_dim**-0.5
        h_BSHK = attention(q_BSHK, k_BSHK, v_BSHK, mask, scale=scale, dropout=self.dropout)
        return self.out(h_BSHK)


class Layer(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x_BSD, mask: AttentionMask):
        cfg = self.config
        dropout = Dropout(cfg.dropout_rate)
        h_BSD = Attention(cfg, name="attention")(x_BSD, mask)
        x_BSD = _norm(cfg, "attention_norm")(x_BSD + dropout(h_BSD))
        x_BSD = constrain(x_BSD, "batch", "length", "activation_embed")

        h_BSD = MLP(
            cfg,
            cfg.activation,
            wi_stddev=cfg.initializer_range,
            wo_stddev=cfg.initializer_range,
            use_bias=True,
            name="mlp",
        )(x_BSD)
        x_BSD = _norm(cfg, "mlp_norm")(x_BSD + dropout(h_BSD))
        return constrain(x_BSD, "batch", "length", "activation_embed"), None


class Encoder(nn.Module):
    """All layers."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BSD, mask: AttentionMask):
        cfg = self.config
        x_BSD, _ = stack(Layer, cfg, cfg.num_layers)(cfg, name="layers")(x_BSD, mask)
        return x_BSD


class MaskedLM(nn.Module):
    """The layers between the encoder's output and the output matrix, and its bias."""

    config: BertConfig

    def setup(self):
        cfg = self.config
        self.transform = _dense(cfg)
        self.norm = _norm(cfg)
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        self.bias = self.param("bias", init, (cfg.vocab_size,), cfg.param_dtype)

    def __call__(self, x):
        return self.norm(ACTIVATIONS[self.config.activation](self.transform(x)))


class Network(nn.Module):
    """The whole network. `t5jax.models.api` wraps its methods as functions of parameters."""

    config: BertConfig

    def setup(self):
        cfg = self.config
        width, stddev = cfg.d_model, cfg.initializer_range
        self.token_embedder = Embedding(cfg, cfg.vocab_size, width, stddev)
        self.position_embedder = Embedding(cfg, cfg.max_positions, width, stddev, axis="positions")
        self.type_embedder = Embedding(cfg, cfg.type_vocab_size, width, stddev, axis=None)
        self.embedding_norm = _norm(cfg)
        self.encoder = Encoder(cfg)
        self.dropout = Dropout(cfg.dropout_rate)
        if cfg.head == "masked_lm":
            self.masked_lm = MaskedLM(cfg)
            if not cfg.tie_word_embeddings:
                self.lm_head = Unembedding(cfg, width, cfg.vocab_size, stddev)
        if cfg.head in ("sequence_classification", "pooler"):
            self.pooler = _dense(cfg)
        if cfg.classifies:
            # There are few classes, which the mesh need not divide: no logical axis.
            self.classifier = Unembedding(
                cfg, width, cfg.num_outputs, stddev, use_bias=True, axis=None
            )

    def encode(self, batch):
        """Returns the last layer's output [B, S, D]."""
        cfg = self.config
        tokens_BS = batch[features.ENCODER_INPUT_TOKENS]
        length = tokens_BS.shape[1]
        if length > cfg.max_positions:
            raise ValueError(
                f"a row of {length} tokens has no positions in this model; {cfg.family} learned "
                f"{cfg.max_positions} (model.max_positions); make rows shorter "
                "(data.inputs_length), or cut the text"
            )
        positions_BS = batch.get(features.ENCODER_POSITIONS, jnp.arange(length)[None])
        mask = AttentionMask(is_token_BS=tokens_BS != cfg.pad_token_id)
        if features.ENCODER_SEGMENT_IDS in batch:
            mask = AttentionMask.within(batch[features.ENCODER_SEGMENT_IDS])

        x_BSD = self.token_embedder(tokens_BS) + self.position_embedder(positions_BS)
        first_type = jnp.zeros((1, 1), jnp.int32)
        x_BSD += self.type_embedder(batch.get(features.ENCODER_TOKEN_TYPES, first_type))
        x_BSD = self.dropout(self.embedding_norm(x_BSD))
        return self.encoder(constrain(x_BSD, "batch", "length", "activation_embed"), mask)

    def hidden(self, batch):
        """Returns the input of `unembed` [B, S, D]: the last layer's output, possibly pooled."""
        cfg = self.config
        x_BSD = self.encode(batch)
        if cfg.head in ("sequence_classification", "pooler"):
            x_BSD = jnp.tanh(self.pooler(x_BSD))
        return self.dropout(x_BSD) if cfg.classifies else x_BSD

    def unembed(self, x):
        """Returns float32 logits [..., V] for `hidden`'s output [..., D]."""
        cfg = self.config
        if cfg.classifies:
            return self.classifier(x)
        x = self.masked_lm(x)
        logits = self.token_embedder.attend(x) if cfg.tie_word_embeddings else self.lm_head(x)
        return logits + float32_for(logits, self.masked_lm.bias)

    def logits(self, batch):
        logits_BSV = self.unembed(self.hidden(batch))
        return constrain(logits_BSV, "batch", "length", None if self.config.classifies else "vocab")


def unembed_params(cfg: BertConfig) -> tuple[str, ...]:
    """Returns the names of the parameters that `Network.unembed` reads."""
    if cfg.head == "masked_lm":
        return ("masked_lm", "token_embedder" if cfg.tie_word_embeddings else "lm_head")
    return ("classifier",) if cfg.classifies else ()


def head_params(cfg: BertConfig) -> dict[str, tuple]:
    """Returns the names of the head's parameters, with what must match for them to be the same."""
    names = {
        "masked_lm": ("masked_lm",) if cfg.tie_word_embeddings else ("masked_lm", "lm_head"),
        "sequence_classification": ("pooler", "classifier"),
        "token_classification": ("classifier",),
        "pooler": ("pooler",),
        "none": (),
    }[cfg.head]
    return {name: (cfg.head, cfg.labels) if name == "classifier" else () for name in names}
