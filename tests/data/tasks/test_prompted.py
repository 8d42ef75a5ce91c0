import itertools
from collections import Counter

import pytest

from t5jax import metrics
from t5jax.data.bridge.tf import elements, seqio
from t5jax.data.bridge.vocabulary import building_for
from t5jax.data.prompts.chat import ChatTemplate
from t5jax.data.prompts.format_strings import Template
from t5jax.data.prompts.jinja import JinjaTemplate
from t5jax.data.run import Run
from t5jax.data.sources.source import Source
from t5jax.data.tasks.prompted import prompted_task, register_variant, variants
from t5jax.tokenizers import ByteTokenizer

ROWS = [{"q": f"q{i}", "a": f"a{i}", "n": i} for i in range(5)]
TEMPLATES = [("Ask: {q}", "{a}"), ("{n}. {q}?", "= {a}")]
pytestmark = pytest.mark.usefixtures("clean_registries")


def make_task(rows, templates=TEMPLATES, **settings):
    source = Source({"train": lambda: rows, "validation": lambda: rows})
    settings = {"metrics": [metrics.exact_match]} | settings
    return prompted_task("prompted", source, templates, **settings)


def examples(task, split, lengths=None):
    with building_for(Run(ByteTokenizer())):
        dataset = task.get_dataset(lengths, split, shuffle=False)
    return list(elements(dataset))


def prompts(task, split, **settings):
    """Returns the rendered pairs, without TensorFlow's pipeline."""
    return [(e["inputs"], e["targets"]) for e in task.source.examples(split, **settings)]


# --- Tasks --------------------------------------------------------------------------------------


def test_training_has_every_template_and_other_splits_take_turns():
    task = make_task(ROWS)
    train = [(e["inputs_pretokenized"], e["targets_pretokenized"]) for e in examples(task, "train")]
    expected = [(f"Ask: q{i}", f"a{i}") for i in range(5)]
    expected += [(f"{i}. q{i}?", f"= a{i}") for i in range(5)]
    assert sorted(train) == sorted((a.encode(), b.encode()) for a, b in expected)
    asked = [e["inputs_pretokenized"].decode() for e in examples(task, "validation")]
    assert asked == ["Ask: q0", "1. q1?", "Ask: q2", "3. q3?", "Ask: q4"]


def test_rows_that_cleaning_drops_take_no_turn():
    rows = Source({"validation": lambda: ROWS}).filter(lambda row: row["q"] != "q1", "not q1")
    task = prompted_task("prompted", rows, TEMPLATES, metrics=[])
    asked = [inputs for inputs, _ in prompts(task, "validation")]
    assert asked == ["Ask: q0", "2. q2?", "Ask: q3", "4. q4?"]


def test_tokens_are_those_of_the_tokenizer_with_eos():
    example = examples(make_task([{"q": "é <extra_id_0>", "a": "a"}], TEMPLATES[:1]), "validation")[
        0
    ]
    assert example["inputs"].tolist() == [*ByteTokenizer().encode("Ask: é <extra_id_0>"), 1]
    assert example["targets"].tolist() == [*ByteTokenizer().encode("a"), 1]


def test_references_and_postprocess_reach_the_metric():
    rows = [{"q": "2+2", "a": "so # 4", "refs": ["4", "# four"]}, {"q": "1", "a": "1", "refs": "1"}]

    def last(text):
        return text.split("#")[-1].strip()

    task = make_task(rows, TEMPLATES[:1], references="refs", postprocess=last)
    both = [
        task.postprocess_fn("ignored", example=e, is_target=True)
        for e in examples(task, "validation")
    ]
    assert both == [["4", "four"], "1"]
    assert task.postprocess_fn("therefore # four", example=None, is_target=False) == "four"
    seqio.TaskRegistry.remove("prompted")
    task = make_task(rows, TEMPLATES[:1], postprocess=last)
    first = examples(task, "validation")[0]
    assert task.postprocess_fn("so # 4", example=first, is_target=True) == "4"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x"}, "there is no field 'a'; the row has q"),
        ({"q": "x", "a": None}, "field 'a' is None, a NoneType; a template needs texts or numbers"),
        ({"q": ["x"], "a": "y"}, r"field 'q' is \['x'\], a list"),
        ({"q": "x", "a": "y", "refs": []}, r"references field 'refs' is \[\]; expected a text"),
        ({"q": "x", "a": "y"}, "there is no field 'refs'; the row has q, a"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row, message):
    good = {"q": "x", "a": "y", "refs": "z"}
    task = make_task([good, good, row], TEMPLATES[:1], references="refs")
    where = "task 'prompted': split 'train', row 2, template 'Ask: {q}': "
    with pytest.raises(ValueError, match=where + message):
        examples(task, "train")


def test_the_texts_are_there_without_tensorflow():
    task = make_task(ROWS, references="a")
    for split in ("train", "validation"):
        names = {"inputs": "inputs_pretokenized", "targets": "targets_pretokenized"}
        names |= {name: name for name in ("prompt_source", "prompt_references")}
        through_seqio = [
            {ours: e[theirs].decode() for ours, theirs in names.items()}
            for e in examples(task, split)
        ]
        assert list(task.source.examples(split)) == through_seqio


def test_a_format_that_does_not_fit_a_value_is_named():
    task = make_task(ROWS, [Template("{q:.1f}", "{a}", name="precise")])
    with pytest.raises(ValueError, match="row 0, template 'precise': Unknown format code 'f'"):
        examples(task, "train")


def test_an_error_of_the_users_own_function_says_where_it_is():
    def rows():
        yield ROWS[0]
        raise KeyError("my own")

    task = prompted_task("own", Source({"train": rows}), TEMPLATES, metrics=[])
    with pytest.raises(ValueError, match=r"task 'own': KeyError: 'my own' \(.*, line \d+\)"):
        examples(task, "train")


# --- What a task may be given --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (("Ask: {q}", "{a}"), r"'Ask: {q}' is not a template; expected a list of pairs"),
        ("{{ q }} ||| {{ a }}", r"templates are '{{ q }} .*; expected a list of pairs"),
        ([("{q}", "{a}", "{n}")], "is not a template; expected a list of pairs"),
        ([("{q}", 3)], "is not a template; expected a list of pairs"),
        ([], "it has no templates; expected a list of pairs"),
        ({}, "it has no templates"),
        ([("{q", "{a}")], "inputs of template '{q'"),
        (["{{ q ||| {{ a }}"], "line 1: expected token"),
        ({"5shot": ("{q}", "{a}")}, "a template is called '5shot', which means exemplars"),
        ({"a b": ("{q}", "{a}"), "a-b": ("{q}", "{a}")}, "two templates are called 'a_b'"),
    ],
)
def test_bad_templates_are_refused_at_registration(templates, message):
    with pytest.raises(ValueError, match="task 'prompted': .*" + message):
        make_task(ROWS, templates)
    assert "prompted" not in seqio.TaskRegistry.names()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"too_long": "trim"}, "too_long of task 'prompted' is 'trim'"),
        ({"empty": "keep"}, "empty of task 'prompted' is 'keep'"),
        ({"exemplar": "{inputs} {answer}"}, "exemplar .* is no format string: KeyError"),
        ({"exemplar": "{inputs}"}, "expected a text with {inputs} and {targets}"),
        (
            {"metrics": metrics.exact_match},
            "task 'prompted': metrics is the function exact_match; expected",
        ),
        ({"metrics": ["accuracy"]}, "task 'prompted': metrics has 'accuracy'; expected functions"),
        (
            {"metrics": [lambda y, p: {}]},
            r"metric <lambda> takes \(y, p\); expected the parameters",
        ),
    ],
)
def test_bad_settings_are_refused_at_registration(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(ROWS, **settings)


def test_a_name_is_taken_once():
    make_task(ROWS)
    with pytest.raises(ValueError, match="'prompted' already; choose another name"):
        make_task(ROWS)


def test_templates_have_names_that_fit_into_a_tasks_name():
    given = [("{q}", "{a}"), Template("{n}", "{a}", "GPT-3 style"), "{{ q }} ||| {{ a }}"]
    task = make_task(ROWS, given)
    assert [template.name for template in task.source.templates] == ["0", "GPT_3_style", "2"]
    assert isinstance(task.source.templates[2], JinjaTemplate)
    assert variants("prompted")[:3] == ["prompted:0", "prompted:GPT_3_style", "prompted:2"]


# --- What is left out ----------------------------------------------------------------------------

ODD = {"odd": "{% if n % 2 %}{{ q }} ||| {{ a }}{% endif %}", "any": ("{n}", "{a}")}


def test_a_template_that_renders_nothing_is_an_error():
    task = make_task(ROWS, ODD)
    where = "task 'prompted': split 'train', row 0, template 'odd': its inputs are empty; filter"
    with pytest.raises(ValueError, match=where):
        examples(task, "train")
    seqio.TaskRegistry.remove("prompted")
    task = make_task([*ROWS, {"q": "x", "a": " ", "n": 1}], TEMPLATES[:1])
    with pytest.raises(ValueError, match="row 5, template 'Ask: {q}': its targets are empty"):
        examples(task, "validation")


def test_a_template_that_renders_nothing_is_a_counted_drop_where_the_task_says_so():
    task = make_task(ROWS, ODD, empty="drop")
    dropped = Counter()
    train = [inputs for inputs, _ in prompts(task, "train", dropped=dropped)]
    assert train == ["0", "q1", "1", "2", "q3", "3", "4"]
    assert dropped == {"nothing rendered (template 'odd')": 3}
    # An evaluation has every row, under the next template that renders it.
    dropped = Counter()
    validation = [inputs for inputs, _ in prompts(task, "validation", dropped=dropped)]
    assert validation == ["0", "1", "2", "3", "4"]
    assert not dropped
    seqio.TaskRegistry.remove("prompted")
    task = make_task(ROWS, [ODD["odd"]], empty="drop")
    assert [inputs for inputs, _ in prompts(task, "validation", dropped=dropped)] == ["q1", "q3"]
    assert dropped == {"rendered by no template": 3}


ASKED = [
    {"c": "one two three four", "q": "Which?", "a": "x"},
    {"c": "one", "q": "Which?", "a": "x"},
    {"c": "onetwothreefourfive" * 3, "q": "Why?", "a": "x"},
    {"c": "one", "q": "Which one of all of these?", "a": "x"},
]
ABOUT = [("{c} | {q}", "{a}")]


def test_the_context_is_cut_and_the_question_is_kept():
    task = make_task(ASKED, ABOUT, may_cut="c")
    run = Run(ByteTokenizer(), lengths={"inputs": 24, "targets": 5})  # 23 bytes and eos.
    assert [inputs for inputs, _ in prompts(task, "validation", run=run)] == [
        "one two three | Which?",
        "one | Which?",
        "onetwothreefourf | Why?",
        " | Which one of all of these?",  # Its end is cut after tokenization.
    ]
    assert prompts(task, "train")[0][0] == "one two three four | Which?"


def test_long_prompts_are_dropped_or_refused():
    run = Run(ByteTokenizer(), lengths={"inputs": 24, "targets": 5})
    task = make_task(ASKED, ABOUT, may_cut=("c",), long_inputs="drop")
    dropped = Counter()
    assert len(prompts(task, "train", run=run, dropped=dropped)) == 3
    assert dropped == {"inputs too long (template '{c} | {q}')": 1}
    assert len(prompts(task, "validation", run=run)) == 4
    seqio.TaskRegistry.remove("prompted")
    task = make_task(ASKED, ABOUT, long_inputs="error")
    with pytest.raises(
        ValueError, match=r"row 0, .*its inputs are 28 tokens long with eos; .*24; "
    ):
        prompts(task, "train", run=run)
    seqio.TaskRegistry.remove("prompted")
    task = make_task(ASKED, ABOUT, may_cut="context")
    with pytest.raises(ValueError, match="field 'context', which may_cut names, is None; expected"):
        prompts(task, "train")


def test_a_prompt_that_is_cut_is_counted_in_the_log(caplog):
    # Three of four are: the first, and the tenth of these among 13.
    task = make_task(ASKED * 4, ABOUT)
    run = Run(ByteTokenizer(), lengths={"inputs": 20, "targets": 5})
    for read, counts in [
        (task.source.once("validation", run), [(1, 1), (13, 10)]),
        (task.source.stream("train", run, 0), None),
    ]:
        caplog.clear()
        assert len(list(itertools.islice(read, 16))) == 16
        if counts is None:
            assert len(caplog.records) == 2  # In another order.
            continue
        assert [record.message for record in caplog.records] == [
            f"task prompted: of {read} examples so far {cut} are longer than data.inputs_length 20 "
            "and lose the end of their inputs; `t5jax tasks show` counts all"
            for read, cut in counts
        ]


LONG = [{"q": "x", "a": "four"}, {"q": "y", "a": "seven"}, {"q": "z", "a": "no"}]


def test_long_targets_are_cut_dropped_or_refused():
    lengths = {"inputs": 20, "targets": 5}  # "four" and eos.
    cut = examples(make_task(LONG, TEMPLATES[:1]), "train", lengths)
    assert [len(e["targets"]) for e in cut] == [5, 5, 3]
    assert cut[1]["targets"].tolist() == [*ByteTokenizer().encode("seve"), 1]

    seqio.TaskRegistry.remove("prompted")
    task = make_task(LONG, TEMPLATES[:1], too_long="drop")
    kept = examples(task, "train", lengths)
    assert [e["targets_pretokenized"] for e in kept] == [b"four", b"no"]
    assert len(examples(task, "validation", lengths)) == 3
    assert len(examples(task, "train")) == 3
    dropped = Counter()
    run = Run(ByteTokenizer(), lengths=lengths)
    assert len(prompts(task, "train", dropped=dropped, run=run)) == 2
    assert dropped == {"targets too long (template 'Ask: {q}')": 1}

    seqio.TaskRegistry.remove("prompted")
    task = make_task(LONG, TEMPLATES[:1], too_long="error")
    message = (
        "row 1, template 'Ask: {q}': its targets are 6 tokens long with eos; expected at most 5"
    )
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=message):
            examples(task, split, lengths)


# --- Variants ------------------------------------------------------------------------------------

NAMED = {"ask": TEMPLATES[0], "number": TEMPLATES[1]}


def variant(name):
    register_variant(name)
    return seqio.TaskRegistry.get(name)


def test_each_template_is_a_task_of_its_own():
    make_task(ROWS, NAMED)
    task = variant("prompted:number")
    for split in ("train", "validation"):
        assert prompts(task, split) == [(f"{i}. q{i}?", f"= a{i}") for i in range(5)]
    assert task.metric_fns == [metrics.exact_match]
    register_variant("prompted:number")  # Once is enough.


def test_exemplars_come_in_front_of_each_prompt():
    make_task(ROWS, NAMED, exemplar="{inputs} -> {targets}; ")
    for name, count in [("prompted:ask:2shot", 2), ("prompted:ask:0shot", 0)]:
        for i, (inputs, targets) in enumerate(prompts(variant(name), "train")):
            *exemplars, asked = inputs.split("; ")
            assert (asked, targets) == (f"Ask: q{i}", f"a{i}")
            rows = [f"Ask: q{j} -> a{j}" for j in range(5) if j != i]
            assert len(set(exemplars)) == count
            assert set(exemplars) <= set(rows)
    both = [inputs.split("; ")[-1] for inputs, _ in prompts(variant("prompted:1shot"), "train")]
    assert both[:3] == ["Ask: q0", "0. q0?", "Ask: q1"]


def test_exemplars_are_fitted_to_the_lengths_that_seqio_is_asked_for():
    make_task(ROWS, NAMED)
    task = variant("prompted:ask:3shot")
    # "Ask: q0" and eos are 8 tokens; an exemplar, "Ask: q0\na0\n\n", is 12.
    for length, count in [(8, 0), (19, 0), (20, 1), (43, 2), (44, 3)]:
        for split in ("train", "validation"):
            read_rows = examples(task, split, {"inputs": length, "targets": 9})
            assert [e["inputs_pretokenized"].count(b"Ask") for e in read_rows] == [count + 1] * 5
            assert all(len(e["inputs"]) == 8 + 12 * count for e in read_rows)
    run = Run(ByteTokenizer(), lengths={"inputs": 20, "targets": 9})
    assert {inputs.count("Ask") for inputs, _ in prompts(task, "train", run=run)} == {2}


def test_exemplars_depend_on_the_tasks_seed_and_stay_the_same():
    texts = {}
    for seed in (0, 1, 0):
        make_task(ROWS, NAMED, seed=seed)
        texts.setdefault(seed, []).append(prompts(variant("prompted:2shot"), "validation"))
        for name in ("prompted", "prompted:2shot"):
            seqio.TaskRegistry.remove(name)
    assert texts[0][0] == texts[0][1] != texts[1][0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompted:numbr", "no variant 'prompted:numbr'; did you mean prompted:number"),
        ("prompted:x", "there are prompted:ask, prompted:number, each also with exemplars"),
        ("prompted:ask:number", "no variant"),
        ("prompted:5shot:ask", "no variant"),
        ("prompted:", "no variant"),
        ("prompted:shot", "no variant"),
    ],
)
def test_an_unknown_variant_is_refused(name, message):
    make_task(ROWS, NAMED)
    with pytest.raises(ValueError, match=message):
        register_variant(name)
    assert name not in seqio.TaskRegistry.names()


def test_other_names_are_left_alone():
    before = set(seqio.TaskRegistry.names())
    register_variant("nothing")
    register_variant("nothing:5shot")
    assert set(seqio.TaskRegistry.names()) == before
    assert variants("nothing") == []


def test_exemplars_need_training_rows():
    source = Source({"test": lambda: ROWS})
    prompted_task("untrained", source, NAMED, metrics=[])
    with pytest.raises(ValueError, match="'untrained' has no split 'train' to draw them from"):
        register_variant("untrained:1shot")
    assert variants("untrained") == ["untrained:ask", "untrained:number"]
    make_task(ROWS, NAMED)
    message = "task 'prompted:ask:5shot': split 'train', row 0, .*there are 4 training rows"
    with pytest.raises(ValueError, match=message):
        prompts(variant("prompted:ask:5shot"), "train")


def test_a_fingerprint_changes_with_what_the_texts_depend_on():
    def fingerprint(**settings):
        task = make_task(ROWS, **({"templates": NAMED} | settings))
        few = variant("prompted:2shot").source.fingerprint()
        for name in ("prompted", "prompted:2shot"):
            seqio.TaskRegistry.remove(name)
        return task.source.fingerprint(), few

    zero, few = fingerprint()
    assert fingerprint() == (zero, few)
    assert zero != few
    assert fingerprint(seed=1) == (zero, few | {"seed": 1})
    settings = [{"templates": TEMPLATES}, {"references": "a"}, {"empty": "drop"}]
    settings += [{"too_long": "drop"}, {"too_long": "error"}]
    assert fingerprint(**settings[-2]) != fingerprint(**settings[-1])
    for setting in settings:
        assert zero not in fingerprint(**setting)


def test_a_chat_takes_the_template_of_the_runs_tokenizer():
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    task = make_task(rows, [ChatTemplate()])
    with pytest.raises(ValueError, match="ByteTokenizer.* has none; take a vocabulary"):
        examples(task, "train")
    seqio.TaskRegistry.remove("prompted")
    text = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    task = make_task(rows, [ChatTemplate(text + "{% if add_generation_prompt %}a:{% endif %}")])
    assert prompts(task, "train") == [("u:q\na:", "a")]
