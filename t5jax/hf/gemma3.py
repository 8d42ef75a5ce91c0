"""The text models of Gemma 3 in Hugging Face's format; the rest is as in Gemma 2.

Source: the checkpoints on the Hub and transformers 4 and 5 (`models/gemma3`). Gemma 3 of 4B and
more is published with an image encoder. Only its text model is read and written.
"""

import warnings
from typing import Any

from t5jax.architectures import GPTConfig, LayerKind
from t5jax.hf import gemma2, llama, rope, tokens
from t5jax.hf.keys import Key, warn_unknown
from t5jax.hf.mapping import Table, Tensors

_KEYS = (
    llama.keys(**gemma2.SHARED, vocab_size=262_208, max_position_embeddings=131_072)
    | gemma2.SHARED_KEYS
    | {"final_logit_softcapping": Key(float), "sliding_window_pattern": Key(int, 6)}
)
# transformers has a key for a cap of attention scores, but does not use it.
_REQUIRED = {"attn_logit_softcapping": (None,)}
_LOCAL_THETA = 10_000.0

# Keys of the model that contains the text model.
_WITH_IMAGES = (
    "text_config",
    "vision_config",
    "mm_tokens_per_image",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
    "initializer_range",
)


def read_config(raw: dict[str, Any], checkpoint: Tensors) -> GPTConfig:
    """Returns the description of the text model in config.json, with a warning if there is more.

    Raises:
      ValueError: if a value is not implemented here, or has another type than its key.
    """
    if raw["model_type"] == "gemma3":
        if not isinstance(raw.get("text_config"), dict):
            raise ValueError("config.json: model_type is 'gemma3', but there is no text_config")
        warnings.warn(
            "config.json is of a Gemma 3 that reads images; its text model is taken, the rest left",
            stacklevel=2,
        )
        warn_unknown(raw, (*_WITH_IMAGES, *_KEYS, *gemma2.REQUIRED, *tokens.KEYS))
        around = {key: raw[key] for key in (*tokens.KEYS, "tie_word_embeddings") if key in raw}
        raw = raw["text_config"] | {key: v for key, v in around.items() if v is not None}

    def pattern(values: dict[str, Any]) -> tuple[LayerKind, ...]:
        return (*("local",) * (values["sliding_window_pattern"] - 1), "global")

    _, fields = gemma2.read_gemma(raw, _KEYS, pattern, _REQUIRED, (rope.LOCAL_KEY,))
    positions = rope.read_rope(raw, theta=1_000_000.0, local_theta=_LOCAL_THETA)
    if "local" not in fields["layer_pattern"]:
        positions["rope_local_theta"] = None
    return GPTConfig(family="gemma3", qk_norm=True, **fields, **positions)


def write_config(config: GPTConfig) -> dict[str, Any]:
    """Returns config.json, without the dtype of the weights."""
    keys = gemma2.write_config(config) | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        # Both kinds, since transformers requires them even if no layer is local.
        **rope.write_rope(config, local_theta=config.rope_local_theta or _LOCAL_THETA),
    }
    pattern = config.layer_pattern
    if pattern[-1] == "global" and "global" not in pattern[:-1]:
        keys["sliding_window_pattern"] = len(pattern)  # For readers that ignore layer_types.
    return keys


TABLE = Table(
    model_types=("gemma3_text", "gemma3"),
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    read_config=read_config,
    write_config=write_config,
    rows=gemma2.rows,
    ignored=(*llama.IGNORED, r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
    renames=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?language_model\.(model\.)?", "model."),
        *llama.RENAMES,
    ),
)
