"""Distillation: the loss by hand, the step with a teacher, the run, and answers as a task."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from command_line import fails, run
from conformance.cases import random_batch, random_params
from conformance.families import GPT2
from conformance.families import T5_EVEN as EVEN
from folders import write_spiece
from t5jax import load, losses, sharding
from t5jax.architectures import T5Config
from t5jax.batch import BatchSpec, train_spec
from t5jax.config import (
    Config,
    DataConfig,
    DistillConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    WatchConfig,
    override,
)
from t5jax.distill.cache import ANSWERS, IDENTITY, INDEX, Answers, TaughtBatches, identity
from t5jax.distill.teacher import Teacher, check_teacher, student_params
from t5jax.losses import distillation, distillation_of_top, top_log_probs
from t5jax.models import api
from t5jax.program import program
from t5jax.source import Source, find
from t5jax.tokenizers import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from t5jax.tokenizers.sentence_piece import read_model
from t5jax.train import train
from tiny import (
    TASK_FILE,
    TINY,
    assert_same_bits,
    make_config,
    one_device,  # noqa: F401
    read_metrics,
    read_state,
    trained_run,
)

SHALLOW = dataclasses.replace(EVEN, num_encoder_layers=1, num_decoder_layers=1)
SMALL = T5Config(
    vocab_size=384,
    d_model=8,
    d_kv=4,
    d_ff=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    scan_layers=False,
)
HOW = DistillConfig("somewhere", temperature=3.0, weight=0.75)


def test_the_loss_is_the_formula():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 2, 3, 5))
    weights = np.asarray([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    expected = 0.0
    for b, t in zip(*np.nonzero(weights), strict=True):
        p = np.exp(teacher[b, t] / 3) / np.exp(teacher[b, t] / 3).sum()
        q = np.exp(student[b, t] / 3) / np.exp(student[b, t] / 3).sum()
        expected += 9 * np.sum(p * np.log(p / q))
    as_float32 = [jnp.asarray(x, jnp.float32) for x in (student, teacher, weights)]
    np.testing.assert_allclose(distillation(*as_float32, 3.0), expected, rtol=1e-5)
    # An embedding that is padded to more rows says nothing of them.
    padded = jnp.concatenate([as_float32[1], jnp.full((2, 3, 2), 9.0)], axis=-1)
    np.testing.assert_allclose(
        distillation(as_float32[0], padded, as_float32[2], 3.0), expected, rtol=1e-5
    )
    assert float(distillation(as_float32[0], as_float32[0], as_float32[2], 3.0)) == 0.0


@pytest.mark.hf
@pytest.mark.parametrize("top_k", [None, 7, 2])
def test_loss_and_gradient_are_those_of_torch(top_k):
    """From all of the teacher's probabilities, and from the largest with the sum of the others."""
    torch = pytest.importorskip("torch", reason="what is compared with")
    student, teacher = np.random.default_rng(0).standard_normal((2, 2, 3, 7)).astype(np.float32) * 3
    weights = np.asarray([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
    logits = torch.tensor(student, requires_grad=True)
    p, q = ((x / 3).softmax(-1) for x in (torch.tensor(teacher), logits))
    if top_k == 2:
        p, ids = p.topk(2)
        q = q.gather(-1, ids)
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    kl = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)
    expected = 9 * (kl * torch.tensor(weights)).sum()
    expected.backward()

    def loss(student):
        if top_k is None:
            return distillation(student, teacher, weights, 3.0)
        log_probs = jax.nn.log_softmax(teacher / 3)
        top, ids = jax.lax.top_k(log_probs, top_k)
        rest = np.log(np.maximum(1 - np.exp(top).sum(-1, keepdims=True), 1e-30))
        said = np.concatenate([top, rest], -1)
        return distillation_of_top(student, ids, said, weights, 3.0, 7)

    found, gradient = jax.value_and_grad(loss)(student)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, logits.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("most", [2**25, 1], ids=["one chunk", "chunks"])
def test_the_loss_of_a_batch_is_that_of_the_logits(monkeypatch, most):
    """In chunks too, with a teacher of another size; its gradient is the student's alone."""
    monkeypatch.setattr(losses, "_MAX_LOGITS_ELSEWHERE", most)
    student = dataclasses.replace(SHALLOW, d_model=12)
    params, taught, batch = random_params(student), random_params(SHALLOW, 1), random_batch(EVEN)
    config = LossConfig()
    how = {"temperature": 3.0, "num_ids": SHALLOW.vocab_size, "top_k": SHALLOW.vocab_size}
    said = jax.jit(lambda: top_log_probs(SHALLOW, taught, batch, **how))()
    asked = batch | dict(zip(("teacher_ids", "teacher_log_probs"), said, strict=True))

    def ours(params):
        by = losses.Teacher(SHALLOW, taught, HOW)
        return losses.batch_loss(student, params, batch, config, teacher=by)[0]

    def ours_asked_before(params):
        by = losses.Teacher(SHALLOW, None, HOW)
        return losses.batch_loss(student, params, asked, config, teacher=by)[0]

    def by_hand(params):
        logits = api.logits(student, params, batch)
        weights = batch["decoder_loss_weights"]
        hard = losses.cross_entropy(logits, batch["decoder_target_tokens"], weights, config)[0]
        soft = distillation(logits, api.logits(SHALLOW, taught, batch), weights, 3.0)
        return 0.25 * hard + 0.75 * soft

    functions = (by_hand, ours, ours_asked_before)
    (b, db), *found = (jax.jit(jax.value_and_grad(f))(params) for f in functions)
    for a, da in found:
        np.testing.assert_allclose(a, b, rtol=1e-5)
        for x, y in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


def test_eight_devices_and_microbatches_learn_as_one(monkeypatch):
    """The teacher is sharded, an argument of the step, and no part of the state."""
    monkeypatch.setattr("t5jax.distill.teacher.find", lambda name: find(str(trained_run())))
    monkeypatch.setattr(sharding, "make_mesh", _MAKE_MESH)
    base = Config(
        model=dataclasses.replace(SHALLOW, vocab_size=384),
        data=DataConfig(batch_size=8),
        optimizer=OptimizerConfig("adamw", learning_rate=1e-2, eps=1e-3),
        watch=WatchConfig(norms=False),  # Less to compile.
        distill=HOW,
    )
    batch = random_batch(base.model, rows=8)

    def after(mesh, changes):
        run = program(override(base, changes), mesh)
        assert len(run.arguments(TINY_SPEC)) == 3
        with run.use():
            state = run.begin(jax.device_put(random_params(base.model), run.shardings.params))
            teacher = run.teacher.params()
            state, metrics = run.step(state, batch, teacher)
            assert float(metrics["distillation"]) > 0
            jax.block_until_ready(jax.tree.leaves(teacher))  # Not donated.
        return jax.device_get(state.params), jax.tree.leaves(teacher)

    one, _ = after(_MAKE_MESH(MeshConfig(), devices=jax.devices()[:1]), {})
    eight, teacher = after(
        _MAKE_MESH(MeshConfig(data=2, fsdp=2, model=2)), {"train.microbatches": 2}
    )
    assert any(not x.sharding.is_fully_replicated for x in teacher)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


_MAKE_MESH = sharding.make_mesh
TINY_SPEC = train_spec(dataclasses.replace(TINY, model=SMALL))


def distilled(run_dir, **sections):
    return make_config(
        run_dir,
        **{
            "distill": {"teacher": str(trained_run()), "weight": 0.9},
            "train": {"steps": 4, "log_every": 2},
            "eval": {"every": 4, "generate": False},
            "checkpoint": {"every": 2},
        }
        | sections,
    )


def test_a_run_with_a_teacher_is_resumed_and_keeps_the_student_alone(tmp_path):
    config = dataclasses.replace(distilled(tmp_path / "whole"), model=SMALL)
    config = override(config, {"eval.every": 0})  # The first part would end with one more.
    train(config)
    assert "train/distillation" in read_metrics(tmp_path / "whole")[0]
    state = read_state(tmp_path / "whole", 4)
    plain = read_state(trained_run(), 10)
    assert state.keys() == plain.keys()  # The same network, without a teacher's parameters.
    assert sum(x.size for x in state.values()) < sum(x.size for x in plain.values())
    train(override(config, {"run_dir": str(tmp_path / "parts"), "train.steps": 2}))
    train(override(config, {"run_dir": str(tmp_path / "parts")}))
    assert_same_bits(tmp_path / "whole", tmp_path / "parts", 4)


def test_a_teacher_that_is_asked_beforehand_teaches_the_same(tmp_path, monkeypatch):
    """Each row once: of the second run none."""
    base = dataclasses.replace(distilled(tmp_path / "live"), model=SMALL)
    train(base)
    folder = tmp_path / "answers"
    cached = override(base, {"distill.cache": str(folder), "run_dir": str(tmp_path / "first")})
    train(cached)
    names = ("train/loss", "train/distillation")
    live, first = (
        [
            [each[name] for name in names]
            for each in read_metrics(tmp_path / run)
            if names[0] in each
        ]
        for run in ("live", "first")
    )
    assert len(live) == 2
    np.testing.assert_allclose(live, first, rtol=1e-4)
    entries = (folder / INDEX).stat().st_size / 32
    assert 0 < entries < 32  # Some of the 32 rows come twice.
    with monkeypatch.context() as patch:
        patch.setattr(TaughtBatches, "_ask", lambda *_: pytest.fail("it was asked again"))
        train(override(cached, {"run_dir": str(tmp_path / "second")}))
    assert_same_bits(tmp_path / "first", tmp_path / "second", 4)


def test_a_folder_of_answers(tmp_path):
    rows = {bytes([i] * 16): (np.full((i, 2), i), np.full((i, 3), -i, np.float32)) for i in (1, 3)}
    who = {"teacher": "a", "top_k": 2}
    first = Answers(tmp_path / "new", who, 2)
    first.add(rows)
    second = Answers(tmp_path / "new", who, 2)  # While another run writes.
    assert (first.writes, second.writes) == (True, False)
    for row, (ids, log_probs) in rows.items():
        found = second.read(row)
        np.testing.assert_array_equal(found[0], ids)
        np.testing.assert_array_equal(found[1], log_probs)
    assert second.read(bytes(16)) is None
    first.close()
    second.close()
    # What a killed run leaves: answers that are not whole, an entry that is not.
    for file, size in ((ANSWERS, -3), (INDEX, -5)):
        content = (tmp_path / "new" / file).read_bytes()
        (tmp_path / "new" / file).write_bytes(content[:size])
        third = Answers(tmp_path / "new", who, 2)
        assert [third.read(row) is not None for row in rows] == [True, False]
        third.add({row: rows[row] for row in list(rows)[1:]})
        np.testing.assert_array_equal(third.read(bytes([3] * 16))[1], rows[bytes([3] * 16)][1])
        assert (tmp_path / "new" / file).read_bytes() == content
        third.close()
    damaged = bytearray((tmp_path / "new" / ANSWERS).read_bytes())
    damaged[0] ^= 1
    (tmp_path / "new" / ANSWERS).write_bytes(damaged)
    with pytest.raises(ValueError, match=r"answers.bin is damaged: a row does not match"):
        Answers(tmp_path / "new", who, 2).read(bytes([1] * 16))
    with pytest.raises(ValueError, match=r"teacher is 'a', now 'b'; give another folder"):
        Answers(tmp_path / "new", who | {"teacher": "b"}, 2)
    (tmp_path / "new" / IDENTITY).unlink()
    with pytest.raises(ValueError, match="is not empty, and holds no answers of a teacher"):
        Answers(tmp_path / "new", who, 2)


def test_answers_are_of_one_teacher_which_is_more_than_its_parameters(tmp_path):
    config, params = Config(model=SMALL, distill=HOW), random_params(SMALL)

    def who(params=params, **changes):
        teacher = Teacher(None, dataclasses.replace(SMALL, **changes), None, None)
        return identity(config, teacher, params)

    Answers(tmp_path / "answers", who(), 384).close()
    Answers(tmp_path / "answers", who(scan_layers=True, remat="full"), 384).close()
    nearly = jax.tree.map(lambda x: x * (1 + 2**-20), params)  # The same in bfloat16.
    for other, what in (
        (who(layer_norm_epsilon=1e-5), "the teacher's layer_norm_epsilon is 1e-06, now 1e-05"),
        (who(mlp_activation="gated-silu"), "the teacher's mlp_activation is 'gated-gelu', now"),
        (who(dtype="bfloat16"), "dtype is 'float32', now 'bfloat16'"),
        (who(nearly), "teacher is '[0-9a-f]{32}', now "),
    ):
        with pytest.raises(ValueError, match=f"of another teacher, or asked otherwise: {what}"):
            Answers(tmp_path / "answers", other, 384)


def test_a_student_begins_with_layers_of_its_teacher():
    wide = dataclasses.replace(EVEN, num_encoder_layers=4, num_decoder_layers=2)
    less = dataclasses.replace(EVEN, num_encoder_layers=2, num_decoder_layers=1)
    params = random_params(wide)
    shardings = jax.tree.map(lambda x: x.sharding, random_params(less))
    teacher = Teacher(None, wide, None, None)
    got = student_params(teacher, params, less, shardings)
    for stack, layers in (("encoder", [0, 3]), ("decoder", [0])):
        kernel = params[stack]["layers"]["mlp"]["wo"]["kernel"]
        np.testing.assert_array_equal(
            got[stack]["layers"]["mlp"]["wo"]["kernel"], kernel[np.asarray(layers)]
        )
    np.testing.assert_array_equal(
        got["token_embedder"]["embedding"], params["token_embedder"]["embedding"]
    )
    narrow = dataclasses.replace(less, d_ff=16)
    with pytest.raises(ValueError, match=r"mlp/wi_0/kernel is \[1, 16, 16\] in the student"):
        student_params(teacher, params, narrow, shardings)
    with pytest.raises(ValueError, match=r"the student has 2 layers, and the teacher only 1"):
        student_params(Teacher(None, less, None, None), random_params(less), wide, shardings)


def test_another_vocabulary_of_the_same_size_is_refused(tmp_path):
    write_spiece(tmp_path)
    ours = load_tokenizer(tmp_path)
    pieces = read_model((tmp_path / "spiece.model").read_bytes(), "it")
    first, second = pieces.pieces[20], pieces.pieces[21]
    first.piece, second.piece = second.piece, first.piece
    theirs = SentencePieceTokenizer(pieces.SerializeToString(), 10)
    source = dataclasses.replace(find(str(trained_run())), loaded_tokenizer=theirs)
    teacher = Teacher(source, source.model, None, None)
    with pytest.raises(ValueError, match=r"has another vocabulary: its id 20 is ") as error:
        check_teacher(teacher, TINY.model, ours, TINY_SPEC)
    # What it says to give is a tokenizer, and so is the run itself.
    (given,) = re.findall(r"--data.vocabulary ([^)]*)\)", str(error.value))
    named = [load_tokenizer(path) for path in (given, trained_run())]
    assert repr(named[0]) == repr(named[1]) == repr(find(str(trained_run())).tokenizer())
    same = dataclasses.replace(source, loaded_tokenizer=ours)
    check_teacher(dataclasses.replace(teacher, source=same), TINY.model, ours, TINY_SPEC)
    starts = dataclasses.replace(TINY.model, decoder_start_token_id=3)
    with pytest.raises(ValueError, match=r"begins texts with the id 0, the student with 3; set"):
        check_teacher(dataclasses.replace(teacher, source=same), starts, ours, TINY_SPEC)


def test_a_teacher_reads_prompts_as_its_student_does():
    model = dataclasses.replace(GPT2, vocab_size=384)
    source = Source(Path("teacher"), Config(model=model), ByteTokenizer())
    asked = Teacher(source, model, None, None), model, ByteTokenizer()
    check_teacher(*asked, BatchSpec(4, 8, 8, kind="decoder"))
    check_teacher(*asked, BatchSpec(4, 0, 16, kind="prefix_lm"))  # Without prompts.
    with pytest.raises(ValueError, match="reads prompts causally, and .* set data.prefix_lm to Fa"):
        check_teacher(*asked, BatchSpec(4, 8, 8, kind="prefix_lm"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0, "teacher": "x"}, "distill.temperature is 0.0; it must be above 0"),
        ({"weight": 0.0, "teacher": "x"}, r"distill.weight is 0.0; it must be in \(0, 1\]"),
        ({"weight": 0.9}, "distill.weight is 0.9, but distill.teacher is empty"),
        ({"teacher": "x", "top_k": 8}, "distill.top_k is 8, but distill.cache is empty"),
        ({"teacher": "x", "cache": "y", "top_k": 0}, "distill.top_k is 0; it must be at least 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**fields)


def test_a_teacher_of_another_kind_is_refused():
    config = Config(model=GPT2, distill=DistillConfig(str(trained_run())))
    with pytest.raises(ValueError, match=r"is an encoder-decoder, but the model is a decoder"):
        program(config, sharding.make_mesh(MeshConfig()))


def test_answers_become_a_task(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("distill", trained_run(), "capitals", "--task-files", TASK_FILE, "--max-tokens", 4)
    status, out, err = run(capsys, *words)
    assert (status, out) == (0, "capitals_distilled\n"), err
    assert re.search(r"warning: \d+ of 40 answers did not end in the tokens", err)
    lines = (tmp_path / "tasks/capitals_distilled.train.jsonl").read_text().splitlines()
    assert len(lines) == 40
    first = json.loads(lines[0])
    assert first["inputs"].startswith("capitals: ")
    answers = load(str(trained_run())).generate([first["inputs"]], max_tokens=4)
    assert first["targets"] == answers[0]
    held_out = (tmp_path / "tasks/capitals_distilled.validation.jsonl").read_text().splitlines()
    row = json.loads(held_out[0])
    assert row["targets"] == row["inputs"].removeprefix("capitals: ").upper()
    # The task is found, and a student trains on it.
    status, out, _ = run(capsys, "tasks", "show", "capitals_distilled", "--vocabulary", "bytes")
    assert status == 0
    assert first["inputs"] in out
    # Again: nothing is answered twice.
    assert run(capsys, *words)[0] == 0
    assert len((tmp_path / "tasks/capitals_distilled.train.jsonl").read_text().splitlines()) == 40
    assert "was begun otherwise" in fails(capsys, *words[:-1], 5)
    # Of a teacher that was trained on, or a task whose prompts are others now, none is kept.
    file = tmp_path / "tasks/capitals_distilled.train.jsonl"
    asked = file.with_name(f"{file.name}.run.json")
    for place, old, new, message in (
        (file, "capitals: ", "Capitals: ", "other prompts: line 1 has 'Capitals: "),
        (asked, '"model_files": [', '"model_files": [0, ', "begun otherwise: model_files was"),
    ):
        content = place.read_text()
        assert old in content
        place.write_text(content.replace(old, new, 1))
        assert message in fails(capsys, *words)
        place.write_text(content)
    taken = fails(capsys, *words, "--name", "words_to_numbers")
    assert "has a task 'words_to_numbers' already, on which a student would be trained" in taken
    assert "no task file registers" in fails(capsys, "distill", trained_run(), "capital")
