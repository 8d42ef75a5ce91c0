"""Tasks and their data. What a task file needs comes from here, in one import:

    from t5jax.data import jsonl, prompted_task

Each name is imported when it is first asked for, so that whoever reads rows or cleans them alone
imports no TensorFlow.
"""

import importlib

_HOMES = {
    # Where rows come from, and what they go through.
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
    # Text, and what is made of it.
    "objectives.task": ("text_task",),
    "objectives.objectives": (
        "CausalLM",
        "MaskedLM",
        "MixtureOfObjectives",
        "PrefixLM",
        "SpanCorruption",
        "ul2",
    ),
    # Mixtures, and vocabularies of one's own.
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
