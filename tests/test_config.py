"""Configs: what they refuse and how they say it, JSON both ways; no option without an effect."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import optax
import pytest

from conformance.cases import random_batch
from conformance.families import LLAMA, VARIANTS, family_of
from conformance.families import T5 as SMALL
from conformance.families import T5_EVEN as EVEN
from golden import assert_golden
from t5jax import sharding
from t5jax.architectures import SIZES, T5Config, published
from t5jax.batch import BatchSpec, pad_ids, pad_rows, shift_right, train_spec, validate_batch
from t5jax.config import (
    AxisRules,
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    EvalConfig,
    InitConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    PruneConfig,
    QuantizeConfig,
    TrainConfig,
    WatchConfig,
    from_json,
    load_config,
    override,
    to_json,
)
from t5jax.losses import cross_entropy
from t5jax.models import api
from t5jax.train_state import train_state_shapes
from t5jax.train_step import make_train_step

# --- What is refused ----------------------------------------------------------------------------

REFUSED = [
    (T5Config, {"dtype": "float16"}, "model.dtype is float16; activations .* overflow float16"),
    (T5Config, {"param_dtype": "float16"}, "model.param_dtype is float16; .* use bfloat16 or"),
    (T5Config, {"dtype": "bfloat"}, "model.dtype is 'bfloat'; .* did you mean bfloat16?"),
    (T5Config, {"family": "t6"}, "model.family is 't6'; expected one of t5"),
    (T5Config, {"mlp_activation": "gated-gelo"}, "expected one of relu, gated-gelu, .*mean gated-"),
    (
        T5Config,
        {"remat": "all"},
        "model.remat is 'all'; expected one of none, minimal, mlp, attention, full",
    ),
    (T5Config, {"d_model": 0}, "model.d_model is 0; it must be at least 1"),
    (T5Config, {"num_decoder_layers": -1}, "model.num_decoder_layers is -1; it must be at least 0"),
    (T5Config, {"vocab_size": 0}, "model.vocab_size is 0"),
    (T5Config, {"dropout_rate": 1.0}, r"model.dropout_rate is 1.0; it must be in \[0, 1\)"),
    (T5Config, {"dropout_rate": -0.1}, r"model.dropout_rate is -0.1; it must be in \[0, 1\)"),
    (T5Config, {"relative_attention_num_buckets": 6}, "is 6; it must be a multiple of 4"),
    (T5Config, {"relative_attention_max_distance": 16}, r"is 16; .* half the buckets \(16\)"),
    (T5Config, {"layer_norm_epsilon": 0.0}, "model.layer_norm_epsilon is 0.0; it must be above 0"),
    (T5Config, {"initializer_factor": 0.0}, "model.initializer_factor is 0.0; it must be above 0"),
    (T5Config, {"pad_token_id": 32128}, r"model.pad_token_id is 32128; .* in \[0, 32128\)"),
    (T5Config, {"eos_token_id": -1}, r"model.eos_token_id is -1; .* in \[0, 32128\)"),
    (T5Config, {"decoder_start_token_id": 99999}, "model.decoder_start_token_id is 99999"),
    (DataConfig, {"inputs_length": 0}, "data.inputs_length is 0; it must be at least 1"),
    (DataConfig, {"targets_length": 0}, "data.targets_length is 0; it must be at least 1"),
    (DataConfig, {"batch_size": -8}, "data.batch_size is -8; it must be at least 1"),
    (DataConfig, {"cache": ""}, "data.cache is ''; expected a folder, or None to stream"),
    (DataConfig, {"mixture_changes": ("a",)}, "has 'a'; expected STEP:NAME, such as 1000:other_m"),
    (DataConfig, {"mixture_changes": ("5:",)}, "has '5:'; expected STEP:NAME"),
    (DataConfig, {"mixture_changes": ("-5:a",)}, "has '-5:a'; expected STEP:NAME"),
    (DataConfig, {"mixture_changes": ("0:a",)}, "has '0:a' after step 0; the steps must increase"),
    (DataConfig, {"mixture_changes": ("9:a", "9:b")}, "has '9:b' after step 9; the steps must"),
    (OptimizerConfig, {"name": "adam"}, "optimizer.name is 'adam'; .* did you mean adamw?"),
    (OptimizerConfig, {"schedule": "cos"}, "optimizer.schedule is 'cos'; .*constant, inverse_sqrt"),
    (OptimizerConfig, {"learning_rate": None}, "optimizer.learning_rate is None; expected a pos"),
    (OptimizerConfig, {"learning_rate": 0.0}, "optimizer.learning_rate is 0.0; expected a posit"),
    (OptimizerConfig, {"learning_rate": float("inf")}, "learning_rate is inf; expected a positive"),
    (OptimizerConfig, {"learning_rate": float("nan")}, "learning_rate is nan; expected a positive"),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps is -1; it must be at least 0"),
    (OptimizerConfig, {"schedule": "inverse_sqrt"}, "is 0 with schedule inverse_sqrt; .* least 1"),
    (OptimizerConfig, {"b2": 0.9}, "b2 is 0.9, but optimizer.name adafactor does not use it"),
    (OptimizerConfig, {"eps": 1e-6}, "leave it out, or set optimizer.name to adamw or adamw_sca"),
    (OptimizerConfig, {"name": "adamw", "decay_rate": 0.8}, "name adamw does not use it; .*adaf"),
    (OptimizerConfig, {"name": "adamw", "clip_threshold": 1.0}, "clip_threshold is 1.0, but opt"),
    (OptimizerConfig, {"final_fraction": 0.1}, "schedule constant does not use it; .*cosine or li"),
    (
        OptimizerConfig,
        {"momentum": 0.9},
        "momentum is 0.9, but optimizer.name adafactor does not u",
    ),
    (
        OptimizerConfig,
        {"decay_steps": 9},
        "decay_steps is 9, but optimizer.schedule constant does n",
    ),
    (
        OptimizerConfig,
        {"name": "schedule_free", "schedule": "cosine"},
        "schedule is cosine, but schedule_free takes the place of a schedule",
    ),
    (
        OptimizerConfig,
        {"name": "schedule_free", "ema": 0.9},
        "ema is 0.9, but the parameters of sc",
    ),
    (OptimizerConfig, {"name": "schedule_free", "b1": 0.0}, "b1 is 0 with schedule_free, whose gr"),
    (OptimizerConfig, {"ema": 1.0}, r"optimizer.ema is 1.0; it must be in \[0, 1\)"),
    (OptimizerConfig, {"clip_norm": 0.0}, "optimizer.clip_norm is 0.0; it must be above 0"),
    (OptimizerConfig, {"weight_decay": 1.0}, r"weight_decay is 1.0; it must be in \[0, 1\)"),
    (OptimizerConfig, {"name": "adamw", "b1": -0.1}, r"b1 is -0.1; it must be in \[0, 1\)"),
    (LossConfig, {"z_loss": -1.0}, "loss.z_loss is -1.0; it must be at least 0"),
    (LossConfig, {"z_loss": float("nan")}, "loss.z_loss is nan; it must be at least 0"),
    (LossConfig, {"label_smoothing": 1.0}, r"loss.label_smoothing is 1.0; it must be in \[0, 1\)"),
    (TrainConfig, {"steps": 0}, "train.steps is 0; it must be at least 1"),
    (TrainConfig, {"microbatches": 0}, "train.microbatches is 0; it must be at least 1"),
    (TrainConfig, {"log_every": 0}, "train.log_every is 0; it must be at least 1"),
    (TrainConfig, {"epochs": -1.0}, "train.epochs is -1.0; it must be above 0"),
    (EvalConfig, {"every": -1}, "eval.every is -1; it must be at least 0"),
    (EvalConfig, {"batch_size": 0}, "eval.batch_size is 0; it must be at least 1"),
    (EvalConfig, {"num_samples": -1}, "eval.num_samples is -1; it must be at least 0"),
    (EvalConfig, {"num_examples": 0}, "eval.num_examples is 0; it must be at least 1"),
    (EvalConfig, {"max_tokens": 0}, "eval.max_tokens is 0; it must be at least 1"),
    (EvalConfig, {"patience": 0}, "eval.patience is 0; it must be at least 1"),
    (EvalConfig, {"patience": 2, "every": 0}, "eval.patience is 2, but .* set eval.every"),
    (CheckpointConfig, {"every": 0}, "checkpoint.every is 0; it must be at least 1"),
    (CheckpointConfig, {"keep": 0}, "checkpoint.keep is 0; it must be at least 1"),
    (MeshConfig, {"data": 0}, "mesh.data is 0; it must be at least 1"),
    (MeshConfig, {"fsdp": -2}, "mesh.fsdp is -2; it must be at least 1"),
    (MeshConfig, {"fsdp": -1}, "mesh.data and mesh.fsdp are -1, .* one can be: set mesh.data to 1"),
    (MeshConfig, {"dcn": "model"}, "mesh.dcn is 'model'; expected one of data, fsdp"),
    (MeshConfig, {"model": 0}, "mesh.model is 0; it must be at least 1"),
    (
        AxisRules,
        {"embed": "fdsp"},
        "axes.embed is 'fdsp'; expected one of data, fsdp, .* model; did",
    ),
    (AxisRules, {"batch": ("data", "expert")}, "axes.batch is 'expert'; expected one of data,"),
]


@pytest.mark.parametrize(("cls", "fields", "message"), REFUSED)
def test_refused(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


def test_mixtures_with_the_steps_that_they_begin_at():
    assert DataConfig("easy").mixtures == ((0, "easy"),)
    data = DataConfig("easy", mixture_changes=("100:hard", "2000:hard:5shot"))
    assert data.mixtures == ((0, "easy"), (100, "hard"), (2000, "hard:5shot"))


def test_batch_size_and_microbatches_must_agree():
    expected = "data.batch_size 30 is not divisible by train.microbatches 4; change one of them"
    with pytest.raises(ValueError, match=expected):
        Config(data=DataConfig(batch_size=30), train=TrainConfig(microbatches=4))


def test_unknown_size_names_the_nearest():
    with pytest.raises(ValueError, match="the model's size is 't5_1_1_bsae'; .*mean t5_1_1_base?"):
        published("t5_1_1_bsae")
    assert published("t5_base", dtype="bfloat16").dtype == "bfloat16"


def test_configs_are_frozen_and_can_be_keys():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run_dir = "elsewhere"
    assert len({Config(), Config(), Config(run_dir="elsewhere")}) == 2


# --- JSON ---------------------------------------------------------------------------------------

FULL = Config(
    run_dir="runs/x",
    model=published("umt5_small", dtype="bfloat16", remat="minimal"),
    init=InitConfig("google/umt5-small"),
    data=DataConfig("mix", ("9:b",), task_files=("a.py", "b.py"), cache="c", pack=True, seed=3),
    optimizer=OptimizerConfig("adamw", 1e-4, "cosine", 10, final_fraction=0.1, b1=0.8),
    loss=LossConfig(0.0, 0.1),
    train=TrainConfig(7, 2, 3, 4),
    eval=EvalConfig(patience=2, generate=False, num_examples=5),
    checkpoint=CheckpointConfig(9, 1),
    mesh=MeshConfig(-1, 4, 1, 2, dcn="fsdp"),
    axes=AxisRules(batch="data", embed=("fsdp", "data"), vocab=None),
)


@pytest.mark.parametrize("config", [Config(), FULL], ids=["default", "full"])
def test_json_gives_the_same_config_back(config):
    back = from_json(to_json(config))
    assert back == config
    assert hash(back) == hash(config)  # Tuples stay tuples.


def test_sections_have_json_too():
    for model in SIZES.values():
        assert from_json(to_json(model), type(model)) == model


@pytest.mark.parametrize("size", ["t5_small", "llama3_1_8b", "gemma3_1b", "bert_tiny"])
def test_a_config_finds_its_kind_of_model_again(size):
    config = Config(model=published(size, dtype="bfloat16"))
    assert from_json(to_json(config)) == config


def test_a_model_of_no_known_family():
    plain = json.loads(to_json(Config()))
    plain["model"]["family"] = "lama"
    with pytest.raises(ValueError, match=r"model\.family is 'lama'; .*did you mean llama\?"):
        from_json(json.dumps(plain))


def test_override_changes_fields_and_nothing_else():
    changes = {
        "run_dir": "y",
        "optimizer.learning_rate": 1,  # A whole number where a float belongs.
        "optimizer.b2": 0.95,
        "data.task_files": ["c.py"],
        "mesh.fsdp": 2,
        "model": LLAMA,
        "model.dropout_rate": 0.25,
        "eval": EvalConfig(every=3),
    }
    config = override(FULL, changes)
    assert (config.run_dir, config.data.task_files, config.mesh.fsdp) == ("y", ("c.py",), 2)
    assert (config.optimizer.learning_rate, config.optimizer.b2) == (1.0, 0.95)
    assert type(config.optimizer.learning_rate) is float
    assert config.model == dataclasses.replace(LLAMA, dropout_rate=0.25)
    assert config.eval == EvalConfig(every=3)
    assert config.optimizer.schedule == FULL.optimizer.schedule
    assert (config.train, config.axes, config.data.seed) == (FULL.train, FULL.axes, 3)
    assert override(FULL, {}) == FULL
    assert override(DataConfig(), {"pack": True}) == DataConfig(pack=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer.learning_rat": 1e-3},
            r"optimizer\.learning_rat does not exist; did you mean l",
        ),
        ({"optimiser.name": "adamw"}, r"field optimiser does not exist; did you mean optimizer\?"),
        ({"data.batch_size": "8"}, r"data\.batch_size is '8'; expected int"),
        ({"data.batch_size": True}, r"data\.batch_size is True; expected int"),
        ({"data.batch_size": 0}, r"data\.batch_size is 0; it must be at least 1"),
        ({"run_dir.x": "y"}, r"run_dir is 'runs/x' and has no field 'x'"),
        ({"optimizer": "adamw"}, r"field optimizer is 'adamw'; expected OptimizerConfig"),
        ({"train.microbatches": 3}, r"batch_size 128 is not divisible by train.microbatches 3"),
    ],
)
def test_override_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        override(FULL, changes)


def test_prefix_lm_is_for_decoders():
    with pytest.raises(ValueError, match=r"data\.prefix_lm is True, but t5 is not a decoder-only"):
        Config(data=DataConfig(prefix_lm=True))


def test_golden_config_json():
    assert_golden("config.json", to_json(Config()))


def changed_json(path, value):
    """The default config's JSON with one field set."""
    plain = json.loads(to_json(Config()))
    section = plain
    *sections, field = path.split(".")
    for name in sections:
        section = section[name]
    section[field] = value
    return json.dumps(plain)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("modle", {}, "config field modle does not exist; did you mean model?"),
        ("data.batchsize", 8, "config field data.batchsize does not exist; did you mean batch_s"),
        ("train.qqq", 1, "config field train.qqq does not exist$"),
        ("data.batch_size", "8", "config field data.batch_size is '8'; expected int"),
        ("data.batch_size", 8.0, "config field data.batch_size is 8.0; expected int"),
        ("data.batch_size", True, "config field data.batch_size is True; expected int"),
        ("data.pack", 1, "config field data.pack is 1; expected bool"),
        ("data.task_files", "a.py", r"config field data.task_files is 'a.py'; expected tuple\[str"),
        ("data.task_files", [1], "config field data.task_files is 1; expected str"),
        ("loss.z_loss", "big", "config field loss.z_loss is 'big'; expected float"),
        ("loss.z_loss", None, "config field loss.z_loss is None; expected float"),
        ("eval.patience", "2", r"config field eval.patience is '2'; expected int | None"),
        ("axes.embed", 3, "config field axes.embed is 3; expected str"),
        ("data", 3, "config field data is 3; expected DataConfig"),
        ("model.dtype", "float16", "model.dtype is float16; activ"),
        ("model.dtype", 16, "model.dtype is 16; expected one of float32, bfloat16"),
        ("data.batch_size", 0, "data.batch_size is 0; it must be at least 1"),
    ],
)
def test_json_that_does_not_fit_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        from_json(changed_json(path, value))


def test_json_of_something_else_is_refused():
    with pytest.raises(ValueError, match="config field .the whole. is .1.; expected Config"):
        from_json("[1]")


def test_json_takes_whole_numbers_for_floats_and_defaults_for_what_is_missing():
    config = from_json('{"loss": {"z_loss": 0}, "data": {"batch_size": 4}}')
    assert config == Config(loss=LossConfig(z_loss=0.0), data=DataConfig(batch_size=4))
    assert isinstance(config.loss.z_loss, float)


# --- Config files -------------------------------------------------------------------------------


def test_every_shipped_config_loads():
    from t5jax import shipped

    names = list(shipped.list_files("configs"))
    assert "quickstart" in names
    sizes = ["t5_pretrain:large", "t5_pretrain:xxl", "gpt_pretrain:llama3_8b"]
    for name in names + sizes:
        config = load_config(name)
        assert from_json(to_json(config)) == config


def test_config_files(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    source = (
        "from t5jax.config import Config\ndef get_config():\n    return Config(run_dir='mine')\n"
    )
    (tmp_path / "configs" / "mine.py").write_text(source)
    (tmp_path / "configs" / "none.py").write_text("x = 1\n")
    (tmp_path / "configs" / "dict.py").write_text("def get_config():\n    return {}\n")
    sized = source.replace("config():", "config(size='small'):").replace("'mine'", "size")
    (tmp_path / "configs" / "sized.py").write_text(sized)
    monkeypatch.chdir(tmp_path)
    assert load_config("mine").run_dir == "mine"
    assert load_config("sized").run_dir == "small"
    assert load_config("sized:large").run_dir == "large"
    assert load_config(str(tmp_path / "configs" / "sized.py:large")).run_dir == "large"
    with pytest.raises(ValueError, match="mine.py has one config, so 'large' has no effect"):
        load_config("mine:large")
    assert load_config(str(tmp_path / "configs" / "mine.py")).run_dir == "mine"
    with pytest.raises(ValueError, match=r"none.py has no get_config\(\); a config file defines"):
        load_config("none")
    with pytest.raises(ValueError, match="in .*dict.py returned dict, not a Config"):
        load_config("dict")
    with pytest.raises(ValueError, match="no config 'quickstrat'; did you mean quickstart?"):
        load_config("quickstrat")
    with pytest.raises(ValueError, match="there is no file nowhere.py"):
        load_config("nowhere.py")


# --- No option without an effect ----------------------------------------------------------------
#
# A section's fields are in one of these tables, with what another value changes; those of a model
# are in tests/conformance.

LOSS_FIELDS = {"z_loss": 0.5, "label_smoothing": 0.3}
TRAIN_FIELDS_HERE, TRAIN_FIELDS_ELSEWHERE = (
    {"seed", "microbatches"},
    {"steps", "log_every", "epochs", "profile", "attention"},
)
# Whole sections in another file's table.
ELSEWHERE = {
    T5Config: "conformance/test_options.py",
    OptimizerConfig: "test_optimizers.py",
    PruneConfig: "prune/test_pruned_runs.py",
    DistillConfig: "test_distill.py",
    InitConfig: "test_train.py",
    DataConfig: "test_train.py",
    EvalConfig: "test_train.py",
    CheckpointConfig: "test_train.py",
    QuantizeConfig: "quantize/test_training.py",
    WatchConfig: "train/test_passing_over.py",
}
CONFIG_FIELDS_ELSEWHERE = {"run_dir"}


def field_names(cls):
    return {field.name for field in dataclasses.fields(cls)}


def test_no_field_is_forgotten():
    sections = {type(getattr(Config(), name)) for name in field_names(Config)}
    sections -= {str, type(None)}  # An adapter: tests/adapters.
    here = {LossConfig, TrainConfig, MeshConfig, AxisRules}
    assert sections == here | set(ELSEWHERE)
    assert {n for n in field_names(Config) if isinstance(getattr(Config(), n), str)} == (
        CONFIG_FIELDS_ELSEWHERE
    )
    assert field_names(LossConfig) == set(LOSS_FIELDS)
    assert field_names(TrainConfig) == TRAIN_FIELDS_HERE | TRAIN_FIELDS_ELSEWHERE


@pytest.mark.parametrize("field", LOSS_FIELDS)
def test_every_field_of_the_loss_has_an_effect(field):
    batch = np.array([[[1.0, 2.0, 6.0]]], "float32"), np.array([[1]]), np.ones((1, 1), "float32")
    changed = dataclasses.replace(LossConfig(), **{field: LOSS_FIELDS[field]})
    difference = cross_entropy(*batch, changed)[0] - cross_entropy(*batch, LossConfig())[0]
    assert abs(difference) > 0.1


def test_every_field_of_training_has_an_effect():
    model = dataclasses.replace(SMALL, dropout_rate=0.3)
    tx, batch = optax.sgd(0.1), random_batch(SMALL, rows=4)
    # As the loop calls it: seed and microbatches are options of the step.

    def program(**options):
        step = make_train_step(model, tx, LossConfig(), **options)
        return str(jax.make_jaxpr(step)(train_state_shapes(model, tx), batch))

    default = program()
    for field in TRAIN_FIELDS_HERE:
        value = getattr(TrainConfig(), field)
        assert program(**{field: value}) == default
        assert program(**{field: value + 1}) != default


# tests/test_sharding.py shows the effect of dcn.
@pytest.mark.parametrize("field", sorted(field_names(MeshConfig) - {"dcn"}))
def test_every_field_of_the_mesh_has_an_effect(field):
    config = dataclasses.replace(MeshConfig(data=1), **{field: 4})
    mesh = sharding.make_mesh(config, jax.devices()[:4])
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == {field: 4}


@functools.cache
def observe_sharding(rules, model):
    """How parameters are split, and the program of the logits with its constraints."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    shapes = api.param_shapes(model)
    batch = random_batch(model, source=4, target=4)
    shardings = sharding.param_shardings(api.param_axes(model), shapes, mesh, rules)
    with sharding.use_mesh(mesh, rules):
        program = jax.make_jaxpr(lambda *args: api.logits(model, *args))(shapes, batch)
    return str([s.spec for s in jax.tree.leaves(shardings)]), str(program)


@pytest.mark.parametrize("field", sorted(field_names(AxisRules) - {"rank"}))
def test_every_logical_axis_has_an_effect(field):
    default = getattr(AxisRules(), field)
    if default is None:
        # "data" or "model" may be another dimension's already: of two the first has it.
        rules = AxisRules(batch="fsdp", **{field: "data"})
        without = AxisRules(batch="fsdp")
    else:
        rules, without = AxisRules(**{field: None}), AxisRules()
    model = EVEN
    if field == "positions":
        model = dataclasses.replace(VARIANTS["gpt2"], **family_of(VARIANTS["gpt2"]).even)
    if field == "kv_heads":  # Heads are shared in decoder-only models.
        sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_heads": 4, "num_kv_heads": 2}
        model = dataclasses.replace(LLAMA, **sizes)
    assert observe_sharding(rules, model) != observe_sharding(without, model)


# --- Batches ------------------------------------------------------------------------------------


def test_batch_spec():
    spec = train_spec(Config(data=DataConfig(inputs_length=5, targets_length=3, batch_size=2)))
    assert spec == BatchSpec(2, 5, 3, pack=False)
    assert {k: (shape, str(t)) for k, (shape, t) in spec.features().items()} == {
        "encoder_input_tokens": ((2, 5), "int32"),
        "decoder_input_tokens": ((2, 3), "int32"),
        "decoder_target_tokens": ((2, 3), "int32"),
        "decoder_loss_weights": ((2, 3), "float32"),
    }
    packed = dataclasses.replace(spec, pack=True).features()
    extra = {k: shape for k, (shape, _) in packed.items() if k not in spec.features()}
    assert extra == {
        "encoder_segment_ids": (2, 5),
        "encoder_positions": (2, 5),
        "decoder_segment_ids": (2, 3),
        "decoder_positions": (2, 3),
    }


def test_validate_batch():
    spec = BatchSpec(4, 9, 7)
    batch = random_batch(SMALL)
    validate_batch(batch, spec)
    renamed = {k.replace("decoder_target_tokens", "labels"): v for k, v in batch.items()}
    message = "missing ['decoder_target_tokens'], extra ['labels']"
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_batch(renamed, spec)
    expected = "batch feature encoder_input_tokens is int64[4, 9]; expected int32[4, 9]"
    wrong = batch | {"encoder_input_tokens": batch["encoder_input_tokens"].astype("int64")}
    with pytest.raises(ValueError, match=re.escape(expected)):
        validate_batch(wrong, spec)
    with pytest.raises(ValueError, match=re.escape("expected int32[4, 8]")):
        validate_batch(batch, BatchSpec(4, 8, 7))


def test_shift_and_padding():
    targets = np.array([[5, 6, 1], [7, 1, 0]], "int32")
    np.testing.assert_array_equal(shift_right(targets, 9), [[9, 5, 6], [9, 7, 1]])
    np.testing.assert_array_equal(targets, [[5, 6, 1], [7, 1, 0]])  # Not in place.
    np.testing.assert_array_equal(
        pad_ids([[1, 2, 3], [4]], 3, 2), np.array([[1, 2], [4, 0], [0, 0]])
    )
    assert pad_ids([], 1, 2).dtype == np.int32
    padded = pad_rows({"a": targets}, 4)["a"]
    np.testing.assert_array_equal(padded, [[5, 6, 1], [7, 1, 0], [0, 0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="a batch of 2 rows cannot be padded to 1"):
        pad_rows({"a": targets}, 1)
