import dataclasses
import io
import json
import logging
import re
import textwrap

import numpy as np
import pytest
import sentencepiece
import tokenizers

from processes import run_forked, said_by_imports
from t5jax import metrics
from t5jax.architectures import GPTConfig, T5Config
from t5jax.batch import shift_right, train_spec
from t5jax.config import Config, DataConfig, EvalConfig, InitConfig
from t5jax.data import pipeline, registry
from t5jax.data.bridge.tf import seqio, tf
from t5jax.data.bridge.vocabulary import (
    RunVocabulary,
    TokenizerVocabulary,
    as_tokenizer,
    building_for,
)
from t5jax.data.run import Run
from t5jax.data.sources.source import Source
from t5jax.data.tasks import prompted
from t5jax.data.tasks.prompted import prompted_task
from t5jax.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from t5jax.tokenizers.training import train_sentencepiece

BYTES = ByteTokenizer()
ROWS = [{"q": f"question {i}" + "!" * i, "a": f"answer {i}"} for i in range(6)]


@pytest.fixture(autouse=True)
def shipped_tasks(clean_registries):
    registry.load_tasks()


def add_task(name="asked", rows=ROWS, splits=("train", "validation"), **settings):
    source = Source({split: lambda: rows for split in splits})
    settings = {"metrics": [metrics.exact_match], "vocabulary": "bytes"} | settings
    return prompted_task(name, source, [("{q}", "{a}")], **settings)


def make_config(mixture="asked", num_examples=None, **data) -> Config:
    sizes = {"inputs_length": 24, "targets_length": 12, "batch_size": 6}
    return Config(
        model=T5Config(vocab_size=384),
        data=DataConfig(mixture=mixture, **(sizes | data)),
        eval=EvalConfig(num_examples=num_examples),
    )


def make_lines() -> list[str]:
    parts = [
        a + b for a in ("c", "d", "m", "s", "th", "l") for b in ("at", "og", "it", "e2", "o17")
    ]
    return [f"the {a} {a}s {b} {b}ing, {a}{b}." for a in parts for b in parts]


def train_model(vocab_size=40) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_lines()),
        model_writer=model,
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def equal(a, b):
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


# --- Batches ------------------------------------------------------------------------------------


def test_an_epoch_has_every_example_once_with_the_right_features():
    add_task()
    batches = pipeline.train_iterator(make_config())
    orders = []
    for _ in range(3):
        batch = next(batches)
        pairs = zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True)
        orders.append([(BYTES.decode(a), BYTES.decode(b)) for a, b in pairs])
        assert sorted(orders[-1]) == sorted((row["q"], row["a"]) for row in ROWS)
        targets = batch["decoder_target_tokens"]
        assert (batch["decoder_input_tokens"] == shift_right(targets, 0)).all()
        assert (batch["decoder_loss_weights"] == (targets != 0)).all()
        assert batch["decoder_loss_weights"].dtype == np.float32
        assert ((targets == 1).sum(axis=1) == 1).all()
    assert orders[0] != orders[1] != orders[2]  # Each epoch has its own order.


def test_a_batch_may_be_larger_than_an_epoch():
    add_task()
    batch = next(pipeline.train_iterator(make_config(batch_size=15)))
    prompts = [BYTES.decode(ids) for ids in batch["encoder_input_tokens"]]
    assert sorted(prompts.count(row["q"]) for row in ROWS) == [2, 2, 2, 3, 3, 3]


def test_packed_rows_hold_whole_examples_side_by_side():
    add_task()
    config = make_config(inputs_length=48, targets_length=40, batch_size=2, pack=True)
    batch = next(pipeline.train_iterator(config))
    assert set(batch) == set(train_spec(config).features())
    by_prompt = {row["q"]: row["a"] for row in ROWS}
    for row in range(2):
        inputs, targets = batch["encoder_segment_ids"][row], batch["decoder_segment_ids"][row]
        assert inputs.max() == targets.max() >= 2
        for segment in range(1, inputs.max() + 1):
            source, target = inputs == segment, targets == segment
            prompt = BYTES.decode(batch["encoder_input_tokens"][row][source])
            ids = batch["decoder_target_tokens"][row][target]
            assert BYTES.decode(ids) == by_prompt[prompt]
            assert batch["decoder_input_tokens"][row][target].tolist() == [0, *ids[:-1]]
            for side, mask in (("encoder", source), ("decoder", target)):
                positions = batch[f"{side}_positions"][row][mask]
                assert positions.tolist() == list(range(mask.sum()))


def test_batches_are_a_function_of_seed_and_step_and_resume_exactly():
    add_task()
    add_task("other", [{"q": f"other {i}", "a": "x"} for i in range(50)])
    seqio.MixtureRegistry.add("mixed", ["asked", "other"], default_rate=1.0)
    config = make_config("mixed", batch_size=4)
    straight = pipeline.train_iterator(config)
    batches = [next(straight) for _ in range(7)]
    assert straight.state()["batches"] == 7

    first = pipeline.train_iterator(config)
    for _ in range(3):
        next(first)
    state = json.loads(json.dumps(first.state()))
    resumed = pipeline.train_iterator(config)
    resumed.restore(state)
    for batch in batches[3:]:
        assert equal(next(resumed), batch)
    assert resumed.state() == straight.state()
    first.restore(pipeline.train_iterator(config).state())  # Back to the beginning.
    assert equal(next(first), batches[0])

    other_seed = pipeline.train_iterator(make_config("mixed", batch_size=4, seed=1))
    assert not equal(next(other_seed), batches[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inputs_length", 25),
        ("targets_length", 13),
        ("batch_size", 8),
        ("pack", True),
        ("seed", 1),
        ("mixture", "other"),
    ],
)
def test_a_state_of_other_batches_is_refused(field, value):
    add_task()
    add_task("other")
    state = pipeline.train_iterator(make_config()).state()
    now = pipeline.train_iterator(make_config(**{field: value}))
    with pytest.raises(ValueError, match=rf"data\.{field} was .* and is {value!r} now"):
        now.restore(state)


def test_a_state_of_another_vocabulary_is_refused():
    add_task()
    state = pipeline.train_iterator(make_config()).state()
    now = pipeline.train_iterator(make_config(), SentencePieceTokenizer(train_model()))
    with pytest.raises(ValueError, match=r"vocabulary was 'ByteTokenizer.* is 'SentencePieceTok"):
        now.restore(state)


def test_an_empty_split_is_an_error_not_a_wait():
    add_task(rows=[])
    with pytest.raises(ValueError, match="task 'asked': split 'train' has no rows"):
        next(pipeline.train_iterator(make_config()))
    with pytest.raises(ValueError, match="task 'asked': split 'validation' has no rows"):
        pipeline.eval_sets(make_config())


def test_a_row_that_does_not_fit_is_a_plain_error_in_training_and_evaluation():
    add_task(rows=[*ROWS, {"q": "no answer"}])
    message = "task 'asked': split '{}', row 6, template .*: there is no field 'a'"
    with pytest.raises(ValueError, match=message.format("train")) as error:
        for _ in zip(pipeline.train_iterator(make_config()), range(5), strict=False):
            pass
    assert error.value.__suppress_context__  # Nothing of TensorFlow's is shown.
    with pytest.raises(ValueError, match=message.format("validation")):
        pipeline.eval_sets(make_config())


# --- Mixtures -----------------------------------------------------------------------------------


def test_plain_seqio_tasks_mix_with_prompted_ones():
    def dataset(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"inputs": ["plain é"], "targets": ["yes"]})

    seqio.TaskRegistry.add(
        "plain",
        source=seqio.FunctionDataSource(dataset, splits=["train", "validation"]),
        output_features=dict.fromkeys(("inputs", "targets"), seqio.Feature(seqio.ByteVocabulary())),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        postprocess_fn=lambda text, example=None, is_target=False: text.upper(),
        metric_fns=[metrics.exact_match],
    )
    [plain] = pipeline.eval_sets(make_config("plain"))
    [example] = plain.examples
    assert example.inputs == example.source == "plain é"
    assert (example.targets, plain.postprocess("no")) == ("YES", "NO")
    assert example.input_ids == [*BYTES.encode("plain é"), 1]
    batch = next(pipeline.train_iterator(make_config("plain", batch_size=2)))
    assert [BYTES.decode(ids) for ids in batch["encoder_input_tokens"]] == ["plain é"] * 2

    # Its vocabulary is fixed, so the run must have the same.
    with pytest.raises(ValueError, match=r"task plain has the vocabulary ByteTok.*but the run"):
        pipeline.tokenizer_for(make_config("plain"), SentencePieceTokenizer(train_model()))


def test_the_nearest_names_are_offered():
    add_task("translate_en_fr")
    with pytest.raises(ValueError, match=r"'translate_en_rf'.*did you mean translate_en_fr"):
        registry.check_mixture("translate_en_rf")
    with pytest.raises(ValueError, match=r"data.mixture is '', .*known are .*translate_en_fr"):
        pipeline.train_iterator(make_config(""))


def test_a_task_with_other_features_is_refused():
    source = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"])
    features = dict.fromkeys(("inputs", "labels"), seqio.Feature(seqio.ByteVocabulary()))
    seqio.TaskRegistry.add("classes", source=source, output_features=features)
    with pytest.raises(
        ValueError, match="classes has the features inputs, labels; expected inputs"
    ):
        registry.check_mixture("classes")


def test_a_variant_of_a_task_is_made_when_it_is_named():
    add_task()
    [eval_set] = pipeline.eval_sets(make_config("asked:1shot", inputs_length=96))
    assert all("answer" in example.inputs for example in eval_set.examples)


def test_the_mixture_changes_at_its_step():
    add_task()
    add_task("other", [{"q": f"other {i}", "a": "x"} for i in range(9)])
    config = make_config(mixture_changes=("2:other",), batch_size=4)
    batches = pipeline.train_iterator(config)
    stopped = pipeline.train_iterator(config)
    for step in range(6):
        if step < 3:
            next(stopped)
        prompts = [BYTES.decode(ids) for ids in next(batches)["encoder_input_tokens"]]
        assert all(prompt.startswith("question" if step < 2 else "other") for prompt in prompts)
    resumed = pipeline.train_iterator(config)
    resumed.restore(stopped.state())
    straight = pipeline.train_iterator(config)
    for _ in range(3):
        next(straight)
    assert equal(next(resumed), next(straight))
    assert [s.task for s in pipeline.eval_sets(config)] == ["asked", "other"]
    with pytest.raises(ValueError, match=r"'absent'.*which no task file registers"):
        pipeline.train_iterator(make_config(mixture_changes=("2:absent",)))


def test_a_process_gets_its_rows_of_the_batch():
    add_task()
    config = make_config(batch_size=4, pack=True, inputs_length=48, targets_length=40)
    whole = next(pipeline.train_iterator(config))
    part = next(pipeline.train_iterator(config, rows=[1, 3]))
    assert equal(part, {name: x[[1, 3]] for name, x in whole.items()})


# --- Evaluation ---------------------------------------------------------------------------------


def test_examples_come_once_in_order_cut_with_eos_and_capped():
    add_task(references="q", postprocess=str.upper)
    config = make_config(inputs_length=12, targets_length=5)
    [eval_set] = pipeline.eval_sets(config)
    assert [e.inputs for e in eval_set.examples] == [row["q"] for row in ROWS]
    assert [e.targets for e in eval_set.examples] == [row["q"].upper() for row in ROWS]
    assert eval_set.postprocess("x") == "X"
    last = eval_set.examples[-1]
    assert last.input_ids == [*BYTES.encode("question 5!"), 1]
    assert [e.seen for e in eval_set.examples][1::4] == ["question 1!", "question 5! […]"]
    assert last.target_ids == [*BYTES.encode("answ"), 1]
    capped = dataclasses.replace(config, eval=EvalConfig(num_examples=2))
    drawn = pipeline.eval_sets(capped)[0].examples
    assert [example in eval_set.examples for example in drawn] == [True, True]
    assert drawn == pipeline.eval_sets(capped)[0].examples
    assert pipeline.eval_sets(config, "train")[0].examples == eval_set.examples


def test_a_part_of_a_split_stands_for_all_of_it():
    rows = [{"q": f"question {i}", "a": "no" if i < 500 else "yes"} for i in range(1000)]
    add_task("sorted", rows)
    dataset = tf.data.Dataset.from_tensor_slices(
        {"inputs": [row["q"] for row in rows], "targets": [row["a"] for row in rows]}
    )
    seqio.TaskRegistry.add(
        "theirs",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: dataset, ["validation"]
        ),
        output_features=dict.fromkeys(("inputs", "targets"), seqio.Feature(seqio.ByteVocabulary())),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    )
    for name in ("sorted", "theirs"):
        [eval_set] = pipeline.eval_sets(make_config(name, num_examples=100))
        answers = [example.targets for example in eval_set.examples]
        assert 30 < answers.count("yes") < 70  # 4 standard deviations.
        assert len({example.inputs for example in eval_set.examples}) == 100
        [whole] = pipeline.eval_sets(make_config(name, num_examples=1000))
        assert [e.inputs for e in whole.examples] == [row["q"] for row in rows]
    [few_shot] = pipeline.eval_sets(make_config("sorted:4shot", 100, inputs_length=500))
    shots = "".join(example.inputs for example in few_shot.examples)
    assert 140 < shots.count("yes") < 260  # Of 400.


def test_a_sample_of_exemplars_is_drawn_from_all_rows(monkeypatch):
    monkeypatch.setattr(prompted, "POOL_SIZE", 50)
    rows = [{"q": f"question {i}", "a": "no" if i < 500 else "yes"} for i in range(1000)]
    add_task("sorted", rows)
    [few_shot] = pipeline.eval_sets(make_config("sorted:4shot", 50, inputs_length=500))
    shots = "".join(example.inputs for example in few_shot.examples)
    assert 50 < shots.count("yes") < 150  # Of 200.


def test_an_example_with_an_empty_target_is_one_of_the_others():
    features = dict.fromkeys(
        ("inputs", "targets"), seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    )
    rows = {"inputs": ["one", "two", ""], "targets": ["1", "", "3"]}
    dataset = tf.data.Dataset.from_tensor_slices(rows)
    seqio.TaskRegistry.add(
        "empty",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: dataset, ["train", "validation"]
        ),
        output_features=features,
        preprocessors=[seqio.preprocessors.tokenize],
        metric_fns=[metrics.exact_match],
    )
    [eval_set] = pipeline.eval_sets(make_config("empty"))
    assert [e.target_ids for e in eval_set.examples] == [[52], [], [54]]
    for pack in (False, True):
        config = make_config("empty", batch_size=3, pack=pack)
        batch = next(pipeline.train_iterator(config))
        assert batch["decoder_loss_weights"].sum() >= 2
        assert (batch["encoder_input_tokens"] == 1).any()  # An empty text is eos.
    rows["targets"] = ["", "", ""]
    empty = tf.data.Dataset.from_tensor_slices(rows)
    source = seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: empty, ["validation"])
    preprocessors = [seqio.preprocessors.tokenize]
    seqio.TaskRegistry.add(
        "nothing", source=source, output_features=features, preprocessors=preprocessors
    )
    with pytest.raises(ValueError, match="task nothing in its split 'validation' are all empty"):
        pipeline.eval_sets(make_config("nothing"))


def test_tasks_without_the_split_are_left_out_and_said(caplog):
    add_task()
    add_task("other", splits=("train", "test"))
    seqio.MixtureRegistry.add("mixed", ["asked", "other"], default_rate=1.0)
    with caplog.at_level(logging.WARNING, logger="t5jax.data.pipeline"):
        assert [s.task for s in pipeline.eval_sets(make_config("mixed"))] == ["asked"]
    assert "task other has no split 'validation' and is left out" in caplog.text
    with pytest.raises(ValueError, match="mixed has no split 'dev'; there are test, train, valid"):
        pipeline.eval_sets(make_config("mixed"), "dev")
    add_task("held_out", splits=("test",))
    with pytest.raises(ValueError, match="held_out has no split 'train'; there are test"):
        pipeline.train_iterator(make_config("held_out"))


# --- Vocabularies -------------------------------------------------------------------------------


def test_ids_in_tensorflow_are_those_in_python(tmp_path):
    (tmp_path / "m.model").write_bytes(train_model())
    piece = load_tokenizer(tmp_path / "m.model")
    whole = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "é": 3}, "<unk>")
    )
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for tokenizer in (
        piece,
        BYTES,
        HuggingFaceTokenizer({"tokenizer.json": whole.to_str().encode()}),
    ):
        vocabulary = TokenizerVocabulary(tokenizer)
        for text in ("the cat", "é <extra_id_0> cat<extra_id_1>\n x", "", "<extra_id_7>ing"):
            ids = tokenizer.encode(text)
            assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
            assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]
            decoded = vocabulary.decode_tf(tf.constant([[*ids, 1]], tf.int32)).numpy()
            assert [d.decode() for d in decoded] == [tokenizer.decode(ids)]

    theirs = seqio.SentencePieceVocabulary(str(tmp_path / "m.model"), extra_ids=100)
    text = "the <extra_id_0> cat <extra_id_99> mat"
    assert theirs.encode(text) == piece.encode(text)
    assert repr(as_tokenizer(theirs)) == repr(piece)
    changed = seqio.SentencePieceVocabulary(str(tmp_path / "m.model"), 100, reverse_extra_ids=False)
    with pytest.raises(ValueError, match="changes its model"):
        as_tokenizer(changed)
    with pytest.raises(ValueError, match=r"cannot read the vocabulary .*absent"):
        as_tokenizer(seqio.SentencePieceVocabulary(str(tmp_path / "absent"), 100))
    with pytest.raises(ValueError, match="PassThroughVocabulary has no tokenizer outside of SeqIO"):
        as_tokenizer(seqio.PassThroughVocabulary(10))


def test_the_run_decides_and_the_task_is_asked_last(tmp_path):
    def own():
        raise AssertionError("the task's own vocabulary must not be made in vain")

    piece = SentencePieceTokenizer(train_model())
    add_task(vocabulary=own)
    (tmp_path / "m.model").write_bytes(train_model(45))
    config = make_config(vocabulary=str(tmp_path / "m.model"))
    assert pipeline.tokenizer_for(config, piece).vocab_size == 145
    assert pipeline.tokenizer_for(make_config(), piece) is piece
    piece.save(tmp_path / "init")
    config = dataclasses.replace(make_config(), init=InitConfig(model=str(tmp_path / "init")))
    assert repr(pipeline.tokenizer_for(config)) == repr(piece)

    batch = next(pipeline.train_iterator(config))
    assert {piece.decode(ids) for ids in batch["decoder_target_tokens"]} == {
        piece.decode(piece.encode(row["a"])) for row in ROWS
    }
    add_task("bytes", vocabulary=ByteTokenizer)
    assert repr(pipeline.tokenizer_for(make_config("bytes"))) == repr(BYTES)


def test_missing_and_clashing_vocabularies_are_errors():
    add_task("open", vocabulary=None)
    with pytest.raises(ValueError, match="open names no vocabulary, and neither does the run; set"):
        pipeline.tokenizer_for(make_config("open"))
    with pytest.raises(ValueError, match=r"the run has no vocabulary; set data.vocabulary"):
        RunVocabulary().encode("text")
    with building_for(Run(BYTES)):
        assert RunVocabulary().encode("a") == [100]
    add_task("odd", vocabulary=3)
    with pytest.raises(ValueError, match="a vocabulary is 3; expected a tokenizer"):
        pipeline.tokenizer_for(make_config("odd"))
    add_task()
    add_task("piece", vocabulary=SentencePieceTokenizer(train_model()))
    seqio.MixtureRegistry.add("clash", ["asked", "piece"], default_rate=1.0)
    with pytest.raises(ValueError, match=r"task piece has the vocabulary SentencePiece.*ByteTok"):
        pipeline.tokenizer_for(make_config("clash"))
    assert pipeline.tokenizer_for(make_config("clash", vocabulary="bytes"))


@pytest.mark.parametrize(("field", "value"), [("pad_token_id", 3), ("eos_token_id", 2)])
def test_a_model_with_other_special_ids_is_refused(field, value):
    add_task()
    model = T5Config(vocab_size=384, **{field: value})
    with pytest.raises(ValueError, match=rf"model\.{field} is {value}; expected"):
        pipeline.tokenizer_for(dataclasses.replace(make_config(), model=model))


def test_the_decoder_starts_as_the_model_says():
    add_task()
    config = make_config()
    model = dataclasses.replace(config.model, decoder_start_token_id=2)
    batch = next(pipeline.train_iterator(dataclasses.replace(config, model=model)))
    assert (batch["decoder_input_tokens"] == shift_right(batch["decoder_target_tokens"], 2)).all()


@pytest.mark.parametrize("pack", [True, False])
def test_rows_beyond_the_positions_that_were_learned_are_refused(pack):
    add_task()
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = GPTConfig(vocab_size=384, max_positions=35, **ids)
    config = dataclasses.replace(make_config(pack=pack), model=model)
    with pytest.raises(ValueError, match="of 36 tokens has no positions .*; gpt2 learned 35"):
        pipeline.train_iterator(config)
    assert pipeline.train_iterator(
        dataclasses.replace(config, model=dataclasses.replace(model, max_positions=36))
    )


def test_what_else_ends_an_answer_is_no_part_of_what_is_expected():
    """A model stops there, so its answers lack it."""
    add_task(rows=[{"q": "q", "a": "yes<extra_id_0>"}, {"q": "q", "a": "<extra_id_0>, no"}])
    config = make_config(targets_length=20)
    model = dataclasses.replace(config.model, more_eos_token_ids=BYTES.sentinel_ids[:1])
    [found] = pipeline.eval_sets(dataclasses.replace(config, model=model), "validation")
    assert [e.targets for e in found.examples] == ["yes", "<extra_id_0>, no"]
    assert found.examples[0].target_ids[-2:] == [BYTES.sentinel_ids[0], 1]


def test_sentencepiece_training_is_repeatable_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("T5JAX_CACHE", str(tmp_path / "cache"))
    lines = make_lines()
    path = train_sentencepiece(iter(lines), 50)
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 150
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert len(tokenizer.encode("17 1717")) >= 6  # Digits are single.
    other = train_sentencepiece(lines, 50, tmp_path / "new" / "other.model")
    assert other.read_bytes() == path.read_bytes()
    path.write_bytes(b"kept")
    assert train_sentencepiece(lines, 50).read_bytes() == b"kept"
    assert train_sentencepiece(lines, 49) != path != train_sentencepiece(lines[1:], 50)
    assert [p.suffix for p in path.parent.iterdir()] == [".model"] * 3


def test_short_lines_are_lines_too(tmp_path):
    path = train_sentencepiece(["ab", "ba", "c"], 7, tmp_path / "x.model")
    assert load_tokenizer(path).decode(load_tokenizer(path).encode("ab c")) == "ab c"


@pytest.mark.parametrize(
    ("lines", "size", "message"),
    [
        ([], 8, "on 0 lines: there is no text in them"),
        ([" "], 8, "on 1 lines: there is no text in them"),
        # Four letters, the sign for a space, pad, eos and unk; some versions find "▁a" besides.
        (["a b c d"] * 3, 5, "of 5 pieces on 3 lines: .* are 8 already; set a size from there"),
        (["a b c d"] * 3, 500, "they have no more than [89]; set that size or a smaller one"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(lines, size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(lines, size, tmp_path / "x.model")


# --- Task files ---------------------------------------------------------------------------------


def test_task_files_load_once_and_a_broken_one_leaves_nothing(tmp_path):
    path = tmp_path / "mine.py"
    task = """
    from t5jax.data.tasks.prompted import prompted_task
    from t5jax.data.sources.source import Source
    source = Source({"train": lambda: [{"q": "x", "a": "y"}]})
    prompted_task("mine", source, [("{q}", "{a}")], metrics=[], vocabulary="bytes")
    """
    path.write_text(textwrap.dedent(task) + "1 / 0\n")
    with pytest.raises(ValueError, match=r"task file .*mine\.py fails: ZeroDivisionError"):
        registry.load_tasks([str(path)])
    assert "mine" not in registry.task_names()
    path.write_text(textwrap.dedent(task))
    registry.load_tasks([str(path)])
    registry.load_tasks([str(path)])
    assert {"mine", "numbers", "numbers_en_fr"} <= set(registry.task_names())
    with pytest.raises(ValueError, match=r"there is no file .*absent\.py"):
        registry.load_tasks([str(tmp_path / "absent.py")])


def test_task_files_import_their_neighbours_and_break_alone(tmp_path, monkeypatch, caplog):
    task = """
    from t5jax.data import Source, prompted_task
    def make(name):
        source = Source({"train": lambda: [{"q": "x", "a": "y"}]})
        prompted_task(name, source, [("{q}", "{a}")], metrics=[], vocabulary="bytes")
    make("%s")
    """
    files = {
        "first_file": "from second_file import make\nmake('of_first')\n",
        "second_file": textwrap.dedent(task % "of_second"),
        "broken_file": "from second_file import make\nmake('of_broken')\n1 / 0\n",
        "leaning_file": "import broken_file\n",
        "_helpers": "VALUE = 3\n",
        "with_helpers": "from _helpers import VALUE\nassert VALUE == 3\n",
    }
    (tmp_path / "tasks").mkdir()
    for name, code in files.items():
        (tmp_path / f"tasks/{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_broken", {})
    with caplog.at_level(logging.WARNING):
        registry.load_tasks()
    assert {"of_first", "of_second", "numbers"} <= set(registry.task_names())
    assert "of_broken" not in registry.task_names()
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    for message, name in zip(said, ("broken_file", "leaning_file"), strict=True):
        assert re.search(
            rf"task file \S+{name}\.py fails: .*ZeroDivisionError.*; its tasks are left out",
            message,
        )
    with pytest.raises(ValueError, match=r"'of_broken', which no .*broken_file\.py fails: ZeroDiv"):
        registry.check_mixture("of_broken")
    with pytest.raises(ValueError, match=r"task file \S+broken_file\.py fails: ZeroDivisionError"):
        registry.load_tasks(["tasks/broken_file.py"])


@pytest.mark.slow
def test_another_process_reads_the_same_batches_and_starts_and_ends_quietly():
    program = """
    from t5jax.architectures import GPTConfig, T5Config
    from t5jax.config import Config, DataConfig
    from t5jax.data import pipeline, registry
    registry.load_tasks()
    data = DataConfig("numbers_to_words", vocabulary="bytes", inputs_length=64, batch_size=8)
    batches = pipeline.train_iterator(Config(model=T5Config(vocab_size=384), data=data))
    next(batches)
    print(next(batches)["encoder_input_tokens"].tolist())
    """
    # It ends while its data set still reads ahead, and must not wait for that.
    ended = run_forked(program)
    assert (ended.err, said_by_imports()) == ("", "")
    data = DataConfig("numbers_to_words", vocabulary="bytes", inputs_length=64, batch_size=8)
    batches = pipeline.train_iterator(Config(model=T5Config(vocab_size=384), data=data))
    next(batches)
    assert json.loads(ended.out) == next(batches)["encoder_input_tokens"].tolist()
