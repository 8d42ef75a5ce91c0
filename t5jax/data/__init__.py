"""Tasks and their data. Task files import everything from here:

    from t5jax.data import jsonl, prompted_task

Names are imported on demand, so that reading and cleaning rows does not import TensorFlow.
"""

import importlib

_HOMES = {
    # Sources of rows, and processing steps.
    "sources.source": ("RowStep", "Source"),
    "sources.kinds": ("csv", "json_file", "jsonl", "parquet", "text", "tsv"),
    "sources.libraries": ("hf_dataset", "tfds"),
    "sources.cleaning": (
        "collapse_whitespace",
        "drop_duplicates",
        "drop_missing",
        "drop_near_duplicates",
        "length_between",
        "lower",
        "normalize_unicode",
        "ratio_between",
        "remove_control_characters",
        "remove_special_characters",
    ),
    # Prompts.
    "prompts.task": ("prompted_task",),
    "prompts.templates": ("JinjaTemplate", "Template", "promptsource"),
    "prompts.chat": ("INSTRUCTION", "ChatTemplate", "EachReply", "as_messages"),
    # Plain text and objectives.
    "objectives.task": ("text_task",),
    "objectives.objectives": (
        "CausalLM",
        "MaskedLM",
        "MixtureOfObjectives",
        "PrefixLM",
        "SpanCorruption",
        "ul2",
    ),
    # Mixtures and vocabularies.
    "mixtures": ("mixture",),
    "bridge.vocabulary": ("RunVocabulary",),
    "../tokenizers.training": ("train_sentencepiece",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    module = f"t5jax.{home[3:]}" if home.startswith("../") else f"{__name__}.{home}"
    return getattr(importlib.import_module(module), name)


def __dir__():
    return __all__
