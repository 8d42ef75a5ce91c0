"""BERT against transformers', under every head, from random weights of small configs; both ways."""

import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from small_bert import (
    SMALL,
    VARIANTS,
    WITH_LOGITS,
    batch_of,
    pack,
    random_params,
    targets_of,
    texts,
)
from t5jax.config import LossConfig
from t5jax.hf import io
from t5jax.losses import batch_loss
from t5jax.models import api
from t5jax.tokenizers import load_tokenizer

torch = pytest.importorskip("torch", reason="transformers' BERT runs on torch")
transformers = pytest.importorskip("transformers", reason="what is compared with")
pytestmark = pytest.mark.hf
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # For models this small a second thread only waits.

CLASSES = {
    "masked_lm": "BertForMaskedLM",
    "sequence_classification": "BertForSequenceClassification",
    "token_classification": "BertForTokenClassification",
    "pooler": "BertModel",
    "none": "BertModel",
}
LOGITS = jax.jit(api.logits, static_argnums=0)
HIDDEN = jax.jit(api.hidden, static_argnums=0)
ENCODE = jax.jit(api.encode, static_argnums=0)
LOSS = jax.jit(batch_loss, static_argnums=(0, 3))
PLAIN = LossConfig(z_loss=0.0)


def without_pooler(config):
    return {"add_pooling_layer": False} if config.head == "none" else {}


def their_config(config):
    names = dict(enumerate(config.labels)) if config.labels else {0: "LABEL_0", 1: "LABEL_1"}
    return transformers.BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.d_ff,
        hidden_act={"gelu-exact": "gelu", "gelu": "gelu_new", "relu": "relu"}[config.activation],
        max_position_embeddings=config.max_positions,
        type_vocab_size=config.type_vocab_size,
        layer_norm_eps=config.layer_norm_epsilon,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.cls_token_id,
        eos_token_id=config.eos_token_id,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )


def their_model(config, kind=None):
    """transformers' model of a description, with random weights."""
    kind = getattr(transformers, kind or CLASSES[config.head])
    model = kind(their_config(config), **without_pooler(config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(0.4 * torch.randn(x.shape, generator=generator))
            if name.endswith("LayerNorm.weight"):
                x.add_(1)
    return model


def their_output(model, config, batch):
    """Output for a padded batch, with the labels that transformers takes, of what is asked."""
    ids = torch.tensor(batch["encoder_input_tokens"]).long()
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if config.num_outputs:
        asked = torch.tensor(batch["encoder_loss_weights"]) > 0
        labels = torch.tensor(batch["encoder_target_tokens"]).long().masked_fill(~asked, -100)
        by_text = config.head == "sequence_classification"
        inputs["labels"] = labels[:, 0] if by_text else labels
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True)


def assert_same_outputs(config, params, model):
    """Compares encodings, logits and loss, or what is pooled."""
    batch = batch_of(config)
    theirs = their_output(model, config, batch)
    real = batch["encoder_input_tokens"] != 0
    encoded = theirs.hidden_states[-1].numpy()
    assert encoded[real].std() > 0.3  # The comparison can fail.
    close = {"atol": 1e-4, "rtol": 1e-4}
    np.testing.assert_allclose(ENCODE(config, params, batch)[real], encoded[real], **close)
    if config.head == "pooler":
        pooled = HIDDEN(config, params, batch)[:, 0]
        np.testing.assert_allclose(pooled, theirs.pooler_output.numpy(), **close)
    if not config.num_outputs:
        return
    ours, expected = np.asarray(LOGITS(config, params, batch)), theirs.logits.numpy()
    if config.head == "sequence_classification":
        ours = ours[:, 0]
    else:
        ours, expected = ours[real], expected[real]
    assert expected.std() > 0.1
    assert ours.shape[-1] == config.num_outputs
    np.testing.assert_allclose(ours, expected, **close)
    sums = LOSS(config, params, batch, PLAIN)[1]
    np.testing.assert_allclose(sums["nll"] / sums["tokens"], theirs.loss.item(), rtol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_their_folder_computes_the_same_here(variant, tmp_path):
    config = VARIANTS[variant]
    model = their_model(config)
    model.save_pretrained(tmp_path)
    assert io.read_config(tmp_path) == config
    assert_same_outputs(config, io.load_params(tmp_path, config), model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_folder_computes_the_same_there(variant, tmp_path):
    config = VARIANTS[variant]
    params = random_params(config)
    io.save_params(tmp_path / "out", config, params, max_shard_bytes=20_000)
    kind = getattr(transformers, CLASSES[config.head])
    model, info = kind.from_pretrained(
        tmp_path / "out", output_loading_info=True, **without_pooler(config)
    )
    assert {what: list(keys) for what, keys in info.items() if keys} == {}
    assert_same_outputs(config, params, model.eval())
    if config.labels:
        assert model.config.id2label == dict(enumerate(config.labels))
        assert model.config.label2id == {label: i for i, label in enumerate(config.labels)}
    auto = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert auto == [CLASSES[config.head]]
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_exact(variant, tmp_path):
    config = VARIANTS[variant]
    params = random_params(config)
    io.save_params(tmp_path / "out", config, params)
    assert io.read_config(tmp_path / "out") == config
    loaded = io.load_params(tmp_path / "out", config)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("variant", WITH_LOGITS)
def test_packed_rows_give_what_each_text_gives_alone(variant):
    config = VARIANTS[variant]
    params, rows = random_params(config), texts(config, (11, 14, 9, 5))
    targets, asked = targets_of(config, rows)
    batch = pack(config, rows, [[0, 1], [2, 3]])
    model = their_model(config)
    model.load_state_dict(
        {k: torch.tensor(v) for k, v in their_tensors(config, params).items()}, strict=False
    )
    logits, total, count = np.asarray(LOGITS(config, params, batch)), 0.0, 0
    starts = [(0, 0), (0, len(rows[0])), (1, 0), (1, len(rows[2]))]
    for text, target, ask, (row, start) in zip(rows, targets, asked, starts, strict=True):
        alone = {
            "encoder_input_tokens": text[None],
            "encoder_target_tokens": target[None],
            "encoder_loss_weights": ask[None].astype("float32"),
        }
        theirs = their_output(model, config, alone)
        ours = logits[row, start : start + len(text)]
        expected = theirs.logits.numpy()[0]
        ours = ours[0] if config.head == "sequence_classification" else ours
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
        total, count = total + theirs.loss.item() * ask.sum(), count + ask.sum()
    sums = LOSS(config, params, batch, PLAIN)[1]
    assert float(sums["tokens"]) == count
    np.testing.assert_allclose(sums["nll"], total, rtol=2e-5)


def their_tensors(config, params):
    rows = io._table(config).rows(config)
    leaves = io._flatten(params)
    return {
        name: np.array(tensor)
        for row in rows
        for name, tensor in row.write(np.asarray(leaves[row.ours]), np.dtype("float32"))
    }


# --- Files as they are found --------------------------------------------------------------------


def pretraining_folder(folder, change=lambda tensors: tensors, **changes):
    """A folder like the first published one: both heads of pretraining, gamma and beta."""
    model = their_model(SMALL, "BertForPreTraining")
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in safetensors.numpy.load_file(path).items()
    }
    tensors["bert.embeddings.position_ids"] = np.arange(29)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    safetensors.numpy.save_file(change(tensors), path)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return model


def test_the_first_files_with_both_heads_gamma_and_beta(tmp_path):
    model = pretraining_folder(tmp_path)
    config = io.read_config(tmp_path)
    assert config == SMALL
    batch = batch_of(config)
    ids = torch.tensor(batch["encoder_input_tokens"]).long()
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=(ids != 0).long()).prediction_logits
    real = batch["encoder_input_tokens"] != 0
    ours = LOGITS(config, io.load_params(tmp_path, config), batch)
    np.testing.assert_allclose(ours[real], theirs.numpy()[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("variant", "head"),
    [("masked_lm", "masked_lm"), ("pooler", "pooler"), ("none", "none")],
)
def test_without_architectures_the_weights_tell(variant, head, tmp_path):
    config = VARIANTS[variant]
    io.save_params(tmp_path / "out", config, random_params(config))
    edit_config(tmp_path / "out", architectures=...)
    assert io.read_config(tmp_path / "out").head == head


def edit_config(folder, **changes):
    """Changes keys of config.json; ... removes one."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))


def test_ids_of_cls_and_sep_come_from_the_tokenizer_where_config_has_none(tmp_path):
    io.save_params(tmp_path / "out", SMALL, random_params(SMALL))
    edit_config(tmp_path / "out", bos_token_id=..., eos_token_id=None)
    with pytest.raises(ValueError, match="model.cls_token_id is 101; it must be in"):
        io.read_config(tmp_path / "out", load_tokenizer)  # There is none.
    words = ["[PAD]", "[UNK]", "[MASK]", "a", "[SEP]", "[CLS]"]
    (tmp_path / "out" / "vocab.txt").write_text("\n".join(words))
    config = io.read_config(tmp_path / "out", load_tokenizer)
    assert (config.cls_token_id, config.eos_token_id, config.pad_token_id) == (5, 4, 0)


def test_labels_without_names(tmp_path):
    config = VARIANTS["sequence_classification"]
    io.save_params(tmp_path / "out", config, random_params(config))
    edit_config(tmp_path / "out", id2label=..., label2id=..., num_labels=3)
    assert io.read_config(tmp_path / "out").labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "is 'relative_key', which is not impleme"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu', which is not implemented; expected one of"),
        ({"is_decoder": True}, "is_decoder is True, which is not implemented; expected False"),
        ({"add_cross_attention": True}, "add_cross_attention is True, which is not implemented"),
        ({"quantization_config": {"a": 1}}, "quantization_config is .*; expected plain float"),
        ({"problem_type": "regression"}, "problem_type is 'regression', which is not implemented"),
        ({"problem_type": "multi_label_classification"}, "problem_type is 'multi_label_class"),
        ({"id2label": {"0": "a"}}, r"model.labels are \('a',\); .* needs two or more"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label is .*; expected a name for each of the"),
        ({"id2label": {"0": "a", "1": "a"}}, "model.labels has 'a' twice"),
        ({"num_attention_heads": 4}, "model.d_model 21 is not divisible by model.num_heads 4"),
        ({"hidden_size": "21"}, "hidden_size is '21'; expected a value of type int"),
        ({"architectures": ["BertForQuestionAnswering"]}, "architectures is .*; expected one of B"),
        ({"architectures": ...}, "the weights hold a classifier: of texts or of words"),
    ],
)
def test_config_that_is_refused(changes, message, tmp_path):
    config = VARIANTS["sequence_classification"]
    io.save_params(tmp_path / "out", config, random_params(config))
    edit_config(tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=message):
        io.read_config(tmp_path / "out")


def test_dropouts_that_differ_are_said(tmp_path):
    io.save_params(tmp_path / "out", SMALL, random_params(SMALL))
    edit_config(tmp_path / "out", attention_probs_dropout_prob=0.0)
    with pytest.warns(UserWarning, match=r"differ \(0.1, 0.0\); training uses the first"):
        assert io.read_config(tmp_path / "out").dropout_rate == 0.1
    edit_config(tmp_path / "out", attention_probs_dropout_prob=0.1, directionality="bidi")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        io.read_config(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("bert.encoder.layer.1.output.dense.bias"),
            r"tensors missing: bert.encoder.layer.\{1\}.output.dense.bias \[21\]",
        ),
        (
            lambda t: t.update({"classifier.weight": np.ones((2, 21), "float32")}),
            r"tensors unexpected: classifier.weight \[2, 21\]",
        ),
        (
            lambda t: t.update({"cls.predictions.bias": np.ones(66, "float32")}),
            r"of another shape: cls.predictions.bias \[66\], expected \[67\]",
        ),
        (
            lambda t: t.update({"cls.predictions.decoder.weight": np.ones((67, 21), "float32")}),
            "cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings.weight",
        ),
        (
            lambda t: t.update({"bert.embeddings.LayerNorm.weight": np.ones(21, "float32")}),
            r"unexpected: bert.embeddings.LayerNorm.gamma \[21\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change, message, tmp_path):
    def changed(tensors):
        change(tensors)
        return tensors

    pretraining_folder(tmp_path, changed)
    with pytest.raises(ValueError, match=message):
        io.load_params(tmp_path, SMALL)
