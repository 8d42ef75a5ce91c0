"""Tasks and their data. Task files import everything from here:

    from t5jax.data import jsonl, prompted_task

Names are imported on demand, so that reading and cleaning rows does not import TensorFlow.
"""

import importlib

_HOMES = {
    # Sources of rows, and processing steps.
    "data.sources.source": ("RowStep", "Source"),
    "data.sources.kinds": ("conll", "csv", "json_file", "jsonl", "parquet", "text", "tsv"),
    "data.sources.libraries": ("hf_dataset", "tfds"),
    "data.sources.cleaning": (
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
    "data.tasks.prompted": ("prompted_task",),
    "data.prompts.format_strings": ("Template",),
    "data.prompts.jinja": ("JinjaTemplate",),
    "data.prompts.promptsource": ("promptsource",),
    "data.prompts.chat": (
        "INSTRUCTION",
        "ChatTemplate",
        "EachReply",
        "as_messages",
        "from_sharegpt",
    ),
    # Plain text and objectives.
    "data.tasks.corpus": ("text_task",),
    "data.objectives.language_modelling": ("CausalLM", "MaskedLM", "PrefixLM"),
    "data.objectives.mixture": ("MixtureOfObjectives", "ul2"),
    "data.objectives.span_corruption": ("SpanCorruption",),
    # Mixtures, vocabularies and metrics.
    "data.mixtures": ("mixture",),
    "data.bridge.vocabulary": ("RunVocabulary",),
    "tokenizers.training": ("train_sentencepiece",),
    "metrics": (
        "accuracy",
        "bits_per_byte",
        "bleu",
        "byte_perplexity",
        "char_bleu",
        "chrf",
        "entity_f1",
        "exact_match",
        "f1_binary",
        "f1_macro",
        "f1_micro",
        "matthews",
        "pearson",
        "rank_accuracy",
        "rouge",
        "spearman",
        "squad",
        "token_f1",
        "word_perplexity",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"t5jax.{_HOME[name]}"), name)


def __dir__():
    return __all__
