"""Conversion of an exported folder for CTranslate2."""

import json
from pathlib import Path
from typing import Any, Literal

from t5jax.hf.files import CONFIG

Quantization = Literal["int8", "int8_float32", "int8_bfloat16", "int16", "float16", "bfloat16"]
# Files that CTranslate2 makes of the folder's, rather than copying them.
_CONVERTED = ("*.safetensors", "*.index.json", CONFIG)


def convert(
    folder: Path, output: Path, quantization: Quantization | None = None, overwrite: bool = False
) -> None:
    """Converts a folder in Hugging Face's format into one for CTranslate2, tokenizer included.

    CTranslate2's own converter asks transformers whether the head of a T5 is tied to the embedding,
    and scales the logits of those that are. Since version 5 transformers says so of every T5, so
    that T5 1.1, mT5 and UMT5 have right tokens with wrong scores. This one reads config.json.

    Args:
      folder: the folder to read.
      output: the folder to write.
      quantization: the type of the weights; None: as they are.
      overwrite: replace an existing model.
    Raises:
      ValueError: if ctranslate2 is not installed or cannot convert the model.
    """
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError as error:
        raise ValueError(
            f"CTranslate2's converter needs {error.name}, which is not installed; "
            "pip install 't5jax[torch]'"
        ) from None

    class Converter(TransformersConverter):
        def load_model(self, model_class: Any, name: str, **options: Any) -> Any:
            model = super().load_model(model_class, name, **options)
            raw = json.loads((Path(name) / CONFIG).read_text(encoding="utf-8"))
            model.config.tie_word_embeddings = raw.get("tie_word_embeddings", True)
            return model

    copied = [p.name for p in folder.iterdir() if not any(map(p.match, _CONVERTED))]
    try:
        Converter(str(folder), copy_files=sorted(copied)).convert(
            str(output), quantization=quantization, force=overwrite
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"CTranslate2 cannot convert this model: {error}") from None
