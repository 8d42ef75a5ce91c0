import dataclasses

import pytest

from t5jax.architectures import T5Config
from t5jax.config import Config, DataConfig
from t5jax.data import pipeline, registry
from t5jax.data.bridge.tf import seqio

TASKS = ["numbers_en_de", "numbers_en_fr", "numbers_to_words", "words_to_numbers"]
ONE_WORD_ANSWERS = ["numbers_en_de", "words_to_numbers"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T5JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        registry.load_tasks()
        data = DataConfig(mixture="numbers", inputs_length=32, targets_length=16, batch_size=64)
        yield Config(model=T5Config(vocab_size=384), data=data)


@pytest.fixture(scope="module")
def tokenizer(config):
    return pipeline.tokenizer_for(config)


@pytest.fixture(scope="module")
def rows():
    """Every number's texts and split, from the tasks' own sources."""
    registry.load_tasks()
    source = seqio.TaskRegistry.get("numbers_en_fr").source.source
    return {split: list(source.rows(split)) for split in source.splits}


def test_no_number_is_in_two_splits(rows):
    assert {k: len(v) for k, v in rows.items()} == {"train": 8000, "validation": 1000, "test": 1000}
    digits = [int(row["digits"]) for split in rows.values() for row in split]
    assert sorted(digits) == list(range(10_000))


def test_texts_are_right(rows):
    by_number = {row["digits"]: row for split in rows.values() for row in split}
    assert by_number["4291"] == {
        "digits": "4291",
        "english": "four thousand, two hundred and ninety-one",
        "french": "quatre mille deux cent quatre-vingt-onze",
        "german": "viertausendzweihunderteinundneunzig",
    }


def test_the_vocabulary_spells_everything_as_hugging_face_does(rows, tokenizer, tmp_path):
    assert tokenizer.vocab_size == 384
    tokenizer.save(tmp_path)
    texts = [text for row in rows["test"] for text in row.values()]
    texts.append("How do you say twelve in French?")
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == text
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(texts).input_ids == [[*tokenizer.encode(text), 1] for text in texts]


def test_every_evaluation_example_fits_and_its_target_is_a_perfect_prediction(config, tokenizer):
    sets = pipeline.eval_sets(config, tokenizer=tokenizer)
    assert [s.task for s in sets] == TASKS
    for eval_set in sets:
        assert len(eval_set.examples) == 1000
        for example in eval_set.examples:
            assert tokenizer.decode(example.input_ids) == example.inputs.replace("\n", " ")
            assert tokenizer.decode(example.target_ids) == example.targets
            assert example.source in example.inputs
        targets = [example.targets for example in eval_set.examples]
        scores = {k: v for f in eval_set.metric_fns for k, v in f(targets, targets).items()}
        bleu = "char_bleu" if eval_set.task in ONE_WORD_ANSWERS else "bleu"
        names = {"exact_match", bleu}
        assert scores == pytest.approx(dict.fromkeys(names, 100.0))


def test_training_mixes_all_tasks_and_templates_and_never_shows_a_held_out_number(
    config, tokenizer, rows
):
    held_out = {row[k] for s in ("validation", "test") for row in rows[s] for k in row}
    batches = pipeline.train_iterator(config, tokenizer)
    prompts = set()
    for _ in range(5):
        batch = next(batches)
        for source, target in zip(
            batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True
        ):
            assert tokenizer.decode(target) not in held_out
            prompts.add(tokenizer.decode(source))
    templates = ("Translate English to French: ", " in German?", " In words:", "Which number is ")
    for part in templates:
        share = sum(part in prompt for prompt in prompts) / len(prompts)
        assert 0.03 < share < 0.2  # One of twelve, in 320 examples.


def test_its_own_model_size_is_checked(config):
    small = dataclasses.replace(config, model=T5Config(vocab_size=256))
    with pytest.raises(ValueError, match=r"384 ids, but model.vocab_size is 256: .*set it to 384"):
        pipeline.tokenizer_for(small)
