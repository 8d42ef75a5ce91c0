"""Two texts in a prompt: tokens, types and truncation are those of BERT's tokenizer."""

import dataclasses
import random

import numpy as np
import pytest

from t5jax.architectures import BertConfig, T5Config
from t5jax.batch import train_spec, validate_batch
from t5jax.config import Config, DataConfig, EvalConfig
from t5jax.data import pipeline
from t5jax.data.batches.converters import make_converter
from t5jax.data.bridge.tf import seqio
from t5jax.data.cache.examples import open_cached
from t5jax.data.cache.store import write_caches
from t5jax.data.prompts.jinja import JinjaTemplate
from t5jax.data.run import Run
from t5jax.data.segments import BREAK, cut
from t5jax.data.sources.source import Source
from t5jax.data.tasks.prompted import prompted_task, register_variant
from t5jax.data.texts import feature_tokenizers, read_examples
from t5jax.metrics import accuracy
from t5jax.models import api
from t5jax.special_tokens import example_format
from t5jax.tokenizers import LabelTokenizer, load_tokenizer

pytestmark = pytest.mark.usefixtures("clean_registries")

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##s", "##t"]
LABELS = LabelTokenizer(["no", "yes"])
LENGTH = 12
MODEL = BertConfig(
    vocab_size=len(PIECES), d_model=8, d_ff=16, num_layers=2, num_heads=2, max_positions=LENGTH,
    head="sequence_classification", labels=LABELS.labels, cls_token_id=2, eos_token_id=3,
)  # fmt: skip


def rows():
    rng = random.Random(0)
    for n in range(40):
        first, second = (
            " ".join(rng.choices("abcdefgh", k=rng.randint(1, 9)) + ["as"] * rng.randint(0, 2))
            for _ in range(2)
        )
        yield {"id": n, "first": first, "second": second, "label": ("no", "yes")[n % 2]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    return tmp_path


@pytest.fixture
def task():
    source = Source({"train": rows, "validation": rows})
    return prompted_task(
        "pairs", source, [(("{first}", "{second}"), "{label}")], metrics=[accuracy]
    )


def config(model=MODEL, **data):
    data = {"mixture": "pairs", "inputs_length": LENGTH, "targets_length": 4} | data
    return Config(model=model, data=DataConfig(**data), eval=EvalConfig(batch_size=4))


def by_transformers(folder):
    """Returns the ids and types of every row, as BERT's own tokenizer has them."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    return [
        tokenizer(r["first"], r["second"], truncation="longest_first", max_length=LENGTH)
        for r in rows()
    ]


@pytest.mark.hf
@pytest.mark.parametrize("cached", [False, True])
def test_rows_are_those_of_berts_tokenizer(cached, folder, task, tmp_path):
    tokenizer = load_tokenizer(folder)
    spec = train_spec(config(pack=False, batch_size=40), has_pairs=True)
    form = example_format(MODEL, tokenizer)
    run = Run(tokenizer, LABELS, {"inputs": LENGTH - 1, "targets": 2})
    if cached:
        write_caches("pairs", tmp_path / "cache", run, processes=1)
        examples = open_cached("pairs", tmp_path / "cache", run, 0).get(range(40))
    else:
        examples = [e for e, _ in zip(task.source.once("validation", run), range(40), strict=True)]
    batch = make_converter(spec, form)([[e] for e in examples])
    validate_batch(batch, spec)
    theirs = by_transformers(folder)
    expected = {
        (tuple(t["input_ids"]), tuple(t["token_type_ids"]), n % 2) for n, t in enumerate(theirs)
    }
    assert {len(ids) for ids, *_ in expected} > {LENGTH, LENGTH - 3}
    found = set()
    for ids, types, label in zip(
        batch["encoder_input_tokens"],
        batch["encoder_token_types"],
        batch["encoder_target_tokens"][:, 0],
        strict=True,
    ):
        n = np.count_nonzero(ids)
        assert not types[n:].any()
        found.add((tuple(ids[:n].tolist()), tuple(types[:n].tolist()), int(label)))
    assert found == expected


@pytest.mark.hf
def test_logits_are_those_of_transformers(folder, task, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from conformance.cases import random_params
    from t5jax.hf import io

    params = random_params(MODEL)
    io.save_params(tmp_path / "out", MODEL, params, tokenizer=load_tokenizer(folder))
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    encoded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(
        [r["first"] for r in rows()][:8],
        [r["second"] for r in rows()][:8],
        truncation="longest_first", max_length=LENGTH, padding="max_length", return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        expected = theirs(**encoded).logits.numpy()

    (eval_set,) = pipeline.eval_sets(config(), "validation", load_tokenizer(folder))
    spec = train_spec(config(pack=False, batch_size=8), has_pairs=True)
    inputs = [
        [{"inputs": np.array(e.input_ids, np.int32), "targets": np.array(e.target_ids, np.int32)}]
        for e in eval_set.examples[:8]
    ]
    batch = make_converter(spec, example_format(MODEL, load_tokenizer(folder)))(inputs)
    logits = np.asarray(api.logits(MODEL, params, batch))[:, 0]
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    # The types matter.
    batch["encoder_token_types"][:] = 0
    assert np.abs(np.asarray(api.logits(MODEL, params, batch))[:, 0] - expected).max() > 1e-2


def test_packed_rows_have_the_types_of_each_example(folder):
    spec = train_spec(config(batch_size=1), has_pairs=True)
    examples = [
        {"inputs": np.array(ids, np.int32), "targets": np.array([label, 2], np.int32)}
        for ids, label in [([5, 0, 6, 7, 3], 1), ([8, 3], 0), ([9, 0, 9, 3], 1)]
    ]
    batch = make_converter(spec, example_format(MODEL, load_tokenizer(folder)))([examples[:2]])
    assert batch["encoder_input_tokens"].tolist() == [[2, 5, 3, 6, 7, 3, 2, 8, 3, 0, 0, 0]]
    assert batch["encoder_token_types"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["encoder_target_tokens"].tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("first", "second", "length", "kept"),
    [
        (3, 3, 8, (3, 3)),
        (9, 2, 8, (4, 2)),
        (2, 9, 8, (2, 4)),
        (9, 5, 9, (4, 3)),  # The one that was longer keeps one more.
        (5, 9, 9, (3, 4)),
        (5, 5, 9, (3, 4)),
        (9, 9, 2, (0, 0)),
    ],
)
def test_the_longer_text_is_cut_first(first, second, length, kept):
    tokens = np.array([*[7] * first, 0, *[8] * second, 3], np.int32)
    found = cut(tokens, length, 0)
    assert found.tolist() == [*[7] * kept[0], 0, *[8] * kept[1], 3]
    assert len(cut(tokens, length)) == length


def test_jinja_may_have_a_second_text(task):
    template = JinjaTemplate("{{ first }} ||| {{ label }}", second=" {{ second }}? ")
    row = {"first": "a b", "second": "c", "label": "no"}
    assert template.render(row) == (f"a b{BREAK}c?", "no", "a b c")
    assert template.render(row | {"second": " "}).is_empty is False
    source = Source({"train": lambda: [row]})
    jinja = prompted_task("jinja", source, [template], metrics=[])
    (example,) = jinja.source.examples("train")
    assert example["inputs"] == f"a b{BREAK}c?"
    assert task.source.fingerprint() != jinja.source.fingerprint()


def test_pairs_are_shown_as_bert_reads_them(folder, task):
    tokenizers = feature_tokenizers(task, load_tokenizer(folder))
    first = next(read_examples(task, "validation", tokenizers, {"inputs": 99, "targets": 9}, {}))
    row = next(rows())
    assert first.texts["inputs"] == f"{row['first']} [SEP] {row['second']}"
    assert first.ids["inputs"].count(3) == 2
    assert 0 not in first.ids["inputs"]


def test_models_that_read_one_text_are_refused(folder, task):
    tokenizer = load_tokenizer(folder)
    one_type = dataclasses.replace(MODEL, type_vocab_size=1)
    with pytest.raises(ValueError, match="two token types .model.type_vocab_size. reads, and not"):
        pipeline.eval_sets(config(one_type), "validation", tokenizer)
    with pytest.raises(ValueError, match="two texts, which only an encoder with model.head seq"):
        pipeline.eval_sets(config(T5Config(vocab_size=64)), "validation", tokenizer)
    with pytest.raises(ValueError, match="'pairs:2shot' asks for exemplars, but a template of"):
        register_variant("pairs:2shot")


def test_the_break_is_no_text():
    source = Source({"train": lambda: [{"q": f"a{BREAK}b", "a": "x"}]})
    task = prompted_task("odd", source, [("{q}", "{a}")], metrics=[])
    with pytest.raises(ValueError, match=r"row 0, .*it has the character '\\U0010fffe'"):
        list(task.source.examples("train"))
    assert "odd" in seqio.TaskRegistry.names()
