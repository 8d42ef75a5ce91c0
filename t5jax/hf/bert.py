"""BERT in Hugging Face's format, under each of its heads.

Source: the checkpoints on the Hub and transformers 4 and 5 (`models/bert`). The first published
files call the parameters of a norm gamma and beta, those of the bare encoder omit "bert.", and
older ones contain positions as a buffer. The head for next-sentence prediction is not read.

Axes: v vocab or classes, d model, e model, h heads, k head dim, f mlp, p positions or types.
"""

import warnings
from typing import Any

from t5jax.architectures import BertActivation, BertConfig, BertHead
from t5jax.hf.keys import GELU_EXACT, GELU_TANH, Key, check_required, read_keys
from t5jax.hf.mapping import Rearrange, Row, Table, Tensors

_WORDS = "bert.embeddings.word_embeddings.weight"
_POOLER = "bert.pooler.dense"
_MASKED_LM = "cls.predictions"
_CLASSIFIER = "classifier"


# --- Tensors ------------------------------------------------------------------------------------


def rows(config: BertConfig) -> list[Row]:
    """Returns the table of a BERT model."""
    tied = config.head == "masked_lm" and config.tie_word_embeddings
    decoder = f"{_MASKED_LM}.decoder"
    table = [
        Row(
            "token_embedder/embedding",
            _WORDS,
            Rearrange("v d -> v d"),
            aliases=(f"{decoder}.weight",) if tied else (),
        )
    ]
    for ours, theirs in (("position", "position"), ("type", "token_type")):
        tensor = f"bert.embeddings.{theirs}_embeddings.weight"
        table.append(Row(f"{ours}_embedder/embedding", tensor, Rearrange("p d -> p d")))
    table += _norm("embedding_norm", "bert.embeddings.LayerNorm")

    ours, theirs = "encoder/layers", "bert.encoder.layer.{layer}"
    for name in ("query", "key", "value"):
        table += _dense(
            f"{ours}/attention/{name}",
            f"{theirs}.attention.self.{name}",
            "(h k) d -> d h k",
            "(h k) -> h k",
        )
    attention = f"{theirs}.attention.output"
    table += _dense(f"{ours}/attention/out", f"{attention}.dense", "d (h k) -> h k d", "d -> d")
    table += _norm(f"{ours}/attention_norm", f"{attention}.LayerNorm")
    table += _dense(f"{ours}/mlp/wi", f"{theirs}.intermediate.dense", "f d -> d f", "f -> f")
    table += _dense(f"{ours}/mlp/wo", f"{theirs}.output.dense", "d f -> f d", "d -> d")
    table += _norm(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm")

    if config.head in ("sequence_classification", "pooler"):
        table += _dense("pooler", _POOLER, "e d -> d e", "e -> e")
    if config.classifies:
        table += _dense("classifier", _CLASSIFIER, "v d -> d v", "v -> v")
    if config.head == "masked_lm":
        transform = f"{_MASKED_LM}.transform"
        table += _dense("masked_lm/transform", f"{transform}.dense", "e d -> d e", "e -> e")
        table += _norm("masked_lm/norm", f"{transform}.LayerNorm")
        view = Rearrange("v -> v")
        if tied:
            aliases = (f"{decoder}.bias",)
            table.append(Row("masked_lm/bias", f"{_MASKED_LM}.bias", view, aliases))
        else:
            # An untied decoder uses a bias of its own; the other one is written but not used.
            copies = (f"{_MASKED_LM}.bias",)
            table.append(Row("masked_lm/bias", f"{decoder}.bias", view, copies=copies))
            table.append(Row("lm_head/kernel", f"{decoder}.weight", Rearrange("v d -> d v")))
    return table


def _dense(ours: str, theirs: str, kernel: str, bias: str) -> list[Row]:
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", Rearrange(kernel)),
        Row(f"{ours}/bias", f"{theirs}.bias", Rearrange(bias)),
    ]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{ours}/scale", f"{theirs}.weight", Rearrange("d -> d")),
        Row(f"{ours}/bias", f"{theirs}.bias", Rearrange("d -> d")),
    ]


# --- config.json --------------------------------------------------------------------------------

_KEYS = {
    "vocab_size": Key(int, 30522),
    "hidden_size": Key(int, 768),
    "num_hidden_layers": Key(int, 12),
    "num_attention_heads": Key(int, 12),
    "intermediate_size": Key(int, 3072),
    "hidden_act": Key(str, "gelu"),
    "hidden_dropout_prob": Key(float, 0.1),
    "attention_probs_dropout_prob": Key(float, 0.1),
    "max_position_embeddings": Key(int, 512),
    "type_vocab_size": Key(int, 2),
    "initializer_range": Key(float, 0.02),
    "layer_norm_eps": Key(float, 1e-12),
    "classifier_dropout": Key(float),
    "tie_word_embeddings": Key(bool, True),
    "pad_token_id": Key(int, 0),
    # The ids of [CLS] and [SEP], which few files have: see `Table.token_ids`.
    "bos_token_id": Key(int, BertConfig.cls_token_id),
    "eos_token_id": Key(int, BertConfig.eos_token_id),
    "id2label": Key(dict),
    "num_labels": Key(int, 2),
}

# Our names to theirs, of which the first one is written.
_ACTIVATIONS: dict[BertActivation, tuple[str, ...]] = {
    "gelu-exact": GELU_EXACT,
    "gelu": GELU_TANH,
    "relu": ("relu",),
}

# Keys for which other values mean a network that is not implemented here.
_REQUIRED = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
}

# Keys of Google's own code, of which those of the pooler are not used.
_HARMLESS = (
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)

_HEADS: dict[str, BertHead] = {
    "BertForMaskedLM": "masked_lm",
    "BertForPreTraining": "masked_lm",
    "BertForSequenceClassification": "sequence_classification",
    "BertForTokenClassification": "token_classification",
    "BertModel": "pooler",
}


def read_config(raw: dict[str, Any], tensors: Tensors) -> BertConfig:
    """Returns the description of the network in config.json.

    Args:
      raw: config.json, with a model_type of the family.
      tensors: the checkpoint's, or none. They determine the head if config.json names no
        architecture, and whether the bare encoder has a pooler.
    Raises:
      ValueError: if a value is not implemented here, or has another type than its key.
    """
    check_required(raw, _REQUIRED)
    values = read_keys(raw, _KEYS, (*_REQUIRED, *_HARMLESS))
    activations = {theirs: ours for ours, names in _ACTIVATIONS.items() for theirs in names}
    if values["hidden_act"] not in activations:
        raise ValueError(
            f"config.json: hidden_act is {values['hidden_act']!r}, which is not implemented; "
            f"expected one of {', '.join(activations)}"
        )
    for key in ("bos_token_id", "eos_token_id"):
        if values[key] >= values["vocab_size"] and raw.get(key) is None:
            raise ValueError(
                f"config.json names no {key}, and there is no tokenizer that does; put the model's "
                "vocab.txt or tokenizer.json into its folder"
            )
    head = _read_head(raw, tensors)
    classifies = head in ("sequence_classification", "token_classification")
    if head == "sequence_classification":
        check_required(raw, {"problem_type": ("single_label_classification",)})
    rates = [values[key] for key in ("hidden_dropout_prob", "attention_probs_dropout_prob")]
    if classifies and values["classifier_dropout"] is not None:
        rates.append(values["classifier_dropout"])
    if len(set(rates)) > 1:
        warnings.warn(
            "config.json: hidden_dropout_prob, attention_probs_dropout_prob and "
            f"classifier_dropout differ ({', '.join(map(str, rates))}); training uses the first "
            "for all of them",
            stacklevel=2,
        )
    return BertConfig(
        vocab_size=values["vocab_size"],
        d_model=values["hidden_size"],
        d_ff=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        max_positions=values["max_position_embeddings"],
        type_vocab_size=values["type_vocab_size"],
        activation=activations[values["hidden_act"]],
        layer_norm_epsilon=values["layer_norm_eps"],
        dropout_rate=rates[0],
        initializer_range=values["initializer_range"],
        head=head,
        labels=_read_labels(values) if classifies else (),
        tie_word_embeddings=values["tie_word_embeddings"] or head != "masked_lm",
        pad_token_id=values["pad_token_id"],
        cls_token_id=values["bos_token_id"],
        eos_token_id=values["eos_token_id"],
    )


def _read_head(raw: dict[str, Any], tensors: Tensors) -> BertHead:
    classes = raw.get("architectures") or []
    if not classes and f"{_CLASSIFIER}.weight" in tensors:
        raise ValueError(
            "config.json has no architectures, and the weights hold a classifier: of texts or of "
            "words? Name BertForSequenceClassification or BertForTokenClassification there"
        )
    if not classes:
        has_lm_head = f"{_MASKED_LM}.bias" in tensors
        classes = ["BertForMaskedLM" if has_lm_head else "BertModel"]
    head = _HEADS[classes[0]]
    if head == "pooler" and tensors and f"{_POOLER}.weight" not in tensors:
        return "none"
    return head


def _read_labels(values: dict[str, Any]) -> tuple[str, ...]:
    """Returns the names of the classes in the order of their ids."""
    if values["id2label"] is None:
        return tuple(f"LABEL_{i}" for i in range(values["num_labels"]))
    labels = {str(key): label for key, label in values["id2label"].items()}
    expected = [str(i) for i in range(len(labels))]
    if sorted(labels) != sorted(expected) or not all(isinstance(x, str) for x in labels.values()):
        raise ValueError(
            f"config.json: id2label is {values['id2label']!r:.200}; expected a name for each of "
            "the classes 0, 1, 2, ..."
        )
    return tuple(labels[i] for i in expected)


def write_config(config: BertConfig) -> dict[str, Any]:
    """Returns config.json, without the dtype of the weights."""
    classes = {head: name for name, head in reversed(_HEADS.items())} | {"none": "BertModel"}
    labels: dict[str, Any] = {}
    if config.classifies:
        labels = {
            "id2label": {str(i): label for i, label in enumerate(config.labels)},
            "label2id": {label: i for i, label in enumerate(config.labels)},
            "classifier_dropout": None,
        }
    if config.head == "sequence_classification":
        labels["problem_type"] = "single_label_classification"
    return labels | {
        "architectures": [classes[config.head]],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "hidden_act": _ACTIVATIONS[config.activation][0],
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.dropout_rate,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": config.layer_norm_epsilon,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": config.tie_word_embeddings,
        "is_decoder": False,
        "use_cache": True,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.cls_token_id,
        "eos_token_id": config.eos_token_id,
    }


TABLE = Table(
    model_types=("bert",),
    architectures=tuple(_HEADS),
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    classifier=f"{_CLASSIFIER}.weight",
    token_ids=(("bos_token_id", "bos_id"), ("eos_token_id", "eos_id")),
    # A buffer of positions; a pooler that the head does not use; the next-sentence head; the unused
    # bias (see `rows`).
    ignored=(
        r"bert\.embeddings\.position_ids",
        r"bert\.pooler\.dense\.(weight|bias)",
        r"cls\.seq_relationship\.(weight|bias)",
        r"cls\.predictions\.bias",
    ),
    renames=(
        (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
)
