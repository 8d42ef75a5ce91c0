"""Meshes: the same training on every shape of eight devices, and nothing large on each of them."""

import dataclasses
import functools
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from conformance.cases import assert_trees_close, random_batch
from conformance.families import T5_EVEN as EVEN
from conformance.families import VARIANTS
from hosts import free_port
from processes import Process, environment
from t5jax import sharding
from t5jax.architectures import published
from t5jax.batch import BatchSpec
from t5jax.config import AxisRules, LossConfig, MeshConfig, OptimizerConfig
from t5jax.models import api
from t5jax.optimizers import make_optimizer
from t5jax.train_state import (
    create_train_state,
    train_state_shapes,
    train_state_shardings,
)
from t5jax.train_step import make_train_step

RULES = AxisRules()
# A vocabulary whose size nothing else has.
MODEL = dataclasses.replace(EVEN, vocab_size=136, dropout_rate=0.2)
LOSS = LossConfig(z_loss=1e-3)
# With so large an eps, Adam does not turn the rounding of a tiny gradient into a whole step.
ADAMW = OptimizerConfig("adamw", 1e-2, eps=1e-2, clip_norm=1.0)
ADAFACTOR = OptimizerConfig("adafactor", 1e-2)


def mesh_of(data=1, fsdp=1, model=1, sequence=1):
    devices = jax.devices()[: data * fsdp * sequence * model]
    return sharding.make_mesh(MeshConfig(data, fsdp, sequence, model), devices)


def lower_step(mesh, model=MODEL, optimizer=ADAMW, microbatches=1, rows=16, length=7, rules=RULES):
    tx = make_optimizer(optimizer, 10, api.param_axes(model))
    shardings = train_state_shardings(model, tx, mesh, rules)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        train_state_shapes(model, tx),
        shardings,
    )
    batch = {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=sharding.batch_sharding(mesh, rules, shape)
        )
        for name, (shape, dtype) in BatchSpec(rows, 9, length).features().items()
    }
    step = jax.jit(
        make_train_step(model, tx, LOSS, microbatches=microbatches),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    with sharding.use_mesh(mesh, rules):
        return step.lower(state, batch)


def create_state(mesh):
    tx = make_optimizer(ADAMW, 10, api.param_axes(MODEL))
    shardings = train_state_shardings(MODEL, tx, mesh, RULES)
    with sharding.use_mesh(mesh, RULES):
        create = jax.jit(lambda key: create_train_state(MODEL, tx, key), out_shardings=shardings)
        return create(jax.random.key(0))


def three_steps(mesh, start):
    """Trains with dropout, in two microbatches; returns the program, the state and the losses."""
    compiled = lower_step(mesh, microbatches=2).compile()
    tx = make_optimizer(ADAMW, 10, api.param_axes(MODEL))
    # A copy: the program gives its memory to the next state.
    state = jax.device_put(jax.device_get(start), train_state_shardings(MODEL, tx, mesh, RULES))
    losses = []
    with sharding.use_mesh(mesh, RULES):
        for seed in range(3):
            batch = random_batch(MODEL, rows=16, seed=seed)
            state, metrics = compiled(state, sharding.shard_batch(batch, mesh, RULES))
            losses.append(float(metrics["loss"] / metrics["tokens"]))
    return compiled, jax.device_get(state), losses


@functools.cache
def on_one_device():
    """Returns the state before, the state after three steps, and their losses."""
    start = create_state(mesh_of(1))
    return start, *three_steps(mesh_of(1), start)[1:]


def test_a_state_is_created_with_the_same_bits_on_a_mesh():
    start, _, _ = on_one_device()
    state = create_state(mesh_of(2, 2, 2))
    kernel = state.params["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 8)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_mesh_trains_as_one_device_does():
    start, expected, expected_losses = on_one_device()
    compiled, state, losses = three_steps(mesh_of(2, 2, 2), start)
    assert len(set(losses)) == 3
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert state.step == 3
    assert_trees_close(state.params, expected.params, atol=1e-5, rtol=1e-4)
    # The logits [rows / 4, 7, vocabulary / 2] of a microbatch are split in both ways, never whole.
    shapes = set(re.findall(r"f32\[(\d+),7,(136|68)\]", compiled.as_text()))
    assert ("2", "68") in shapes
    assert not [shape for shape in shapes if shape[1] == "136"]


# --- Constraints, and what lies where -----------------------------------------------------------


def num_constraints(lowered) -> int:
    return len(re.findall(r"sharding_constraint|@Sharding", lowered.as_text()))


def test_the_lowered_step_holds_its_constraints():
    mesh = mesh_of(2, 2, 2)
    count = num_constraints(lower_step(mesh))
    # Forward in one layer of each stack: 3 a projection of attention, 1 a residual branch, 1 in
    # the MLP; encoder 3 + 2 + 1, decoder 6 + 3 + 1; 2 embeddings. The backward pass has as many.
    assert count >= 2 * (6 + 10 + 2)
    # Microbatches are constrained too: one for each of the four features.
    assert num_constraints(lower_step(mesh, microbatches=2)) >= count + 4


def test_constrain_is_the_identity_outside_and_named_inside():
    x = jnp.ones((8, 4, 16))
    assert sharding.constrain(x, "batch", "length", "mlp") is x
    mesh = mesh_of(2, 2, 2)
    with sharding.use_mesh(mesh):
        f = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "mlp"))
        got = f(x).sharding
        assert got.is_equivalent_to(
            NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence", "model")), 3
        )
        with pytest.raises(ValueError, match="no logical axis 'mpl'; did you mean mlp?"):
            sharding.constrain(x, "batch", "length", "mpl")
    assert sharding.constrain(x, "batch", "length", "mlp") is x  # The rules are gone again.


def test_a_program_of_other_rules_is_not_used_again():
    f = jax.jit(lambda x: sharding.constrain(x, "batch", "mlp"))
    x, mesh = jnp.ones((8, 16)), mesh_of(2, 2, 2)
    shapes = []
    for rules in (AxisRules(), AxisRules(mlp=None), AxisRules(batch="data"), AxisRules()):
        with sharding.use_mesh(mesh, rules):
            shapes.append(f(x).sharding.shard_shape(x.shape))
    assert shapes == [(2, 8), (2, 16), (4, 8), (2, 8)]
    assert f(x).sharding.shard_shape(x.shape) == x.shape


@pytest.mark.parametrize("optimizer", [ADAMW, ADAFACTOR], ids=lambda o: o.name)
def test_under_fsdp_nothing_large_is_replicated(optimizer):
    model = published("t5_1_1_base")
    tx = make_optimizer(optimizer, 10, api.param_axes(model))
    shapes = train_state_shapes(model, tx)
    shardings = train_state_shardings(model, tx, mesh_of(fsdp=8), RULES)
    total = split = 0
    for (path, x), s in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        total += x.size
        split += s.shard_shape(x.shape) != x.shape and x.size
        if x.size > 100_000:
            assert np.prod(s.shard_shape(x.shape)) == x.size / 8, jax.tree_util.keystr(path)
    params = sum(x.size for x in jax.tree.leaves(shapes.params))
    copies = 3 if optimizer is ADAMW else 1  # Adam has two moments.
    assert split == pytest.approx(copies * params, rel=1e-3)
    assert total == pytest.approx(split, rel=5e-3)


def test_under_tensor_parallelism_the_stacks_are_split():
    model = published("t5_1_1_base")
    shapes = api.param_shapes(model)
    shardings = sharding.param_shardings(api.param_axes(model), shapes, mesh_of(model=4), RULES)
    for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        if x.size > 100_000:
            assert np.prod(s.shard_shape(x.shape)) == x.size / 4


def test_a_full_size_step_lowers():
    mesh = mesh_of(fsdp=8)
    model = published("t5_1_1_xxl", dtype="bfloat16", remat="full")
    lowered = lower_step(mesh, model, ADAFACTOR, rows=64, length=114)
    assert num_constraints(lowered) >= 36
    assert "tensor<24x4096x10240xf32>" in lowered.as_text()


@pytest.mark.parametrize("variant", ["t5_1_1", "t5_1_0", "umt5", "byt5", "ul2"])
def test_every_leaf_of_the_state_has_a_sharding(variant):
    model = dataclasses.replace(VARIANTS[variant], d_model=16)
    tx = make_optimizer(ADAMW, 10, api.param_axes(model))
    mesh = mesh_of(fsdp=8)
    shapes, shardings = (
        train_state_shapes(model, tx),
        train_state_shardings(model, tx, mesh, RULES),
    )
    assert jax.tree.structure(shapes) == jax.tree.structure(shardings)
    num_split = sum(not s.is_fully_replicated for s in jax.tree.leaves(shardings))
    # Everything but bias tables has an "embed", and Adam has two moments of each.
    tables = 2
    assert num_split == 3 * (len(jax.tree.leaves(shapes.params)) - tables)


# --- The mesh and its errors --------------------------------------------------------------------


def test_make_mesh():
    def shape(**sizes):
        return tuple(sharding.make_mesh(MeshConfig(**sizes)).shape.values())

    assert tuple(sharding.make_mesh().shape) == ("data", "fsdp", "sequence", "model")
    assert shape() == (8, 1, 1, 1)
    assert shape(fsdp=2, model=2) == (2, 2, 1, 2)
    assert shape(data=1, fsdp=-1, sequence=2) == (1, 4, 2, 1)
    assert shape(data=4, model=-1) == (4, 1, 1, 2)
    assert set(sharding.make_mesh().devices.flat) == set(jax.devices())


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the mesh asks of a device: here four in each of two slices."""

    id: int
    platform: str = "cpu"
    device_kind: str = "chip"

    @property
    def slice_index(self):
        return self.id // 4

    process_index = slice_index


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"fsdp": 4}, (2, 4, 1, 1)),
        ({"fsdp": 2, "model": 2}, (2, 2, 1, 2)),
        ({"data": 4, "sequence": 2}, (4, 1, 2, 1)),
        ({"data": 1, "fsdp": -1, "dcn": "fsdp"}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": 2, "model": 2, "dcn": "fsdp"}, (2, 2, 1, 2)),
    ],
)
def test_one_axis_spans_slices(sizes, shape):
    # In the order in which no two neighbours are of one slice.
    chips = sorted(map(Chip, range(8)), key=lambda chip: chip.id % 4)
    mesh, config = sharding.make_mesh(MeshConfig(**sizes), chips), MeshConfig(**sizes)
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    axis = mesh.axis_names.index(config.dcn)
    halves = np.split(slices, 2, axis)
    assert [set(half.flat) for half in halves] == [{0}, {1}]


@dataclasses.dataclass(frozen=True)
class TorusChip:
    """One of 4 x 4 x 4 chips."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0

    @property
    def coords(self):
        return [self.id % 4, self.id // 4 % 4, self.id // 16]


@pytest.mark.parametrize("sizes", [(4, 16, 1, 1), (8, 8, 1, 1), (2, 8, 2, 2), (1, 64, 1, 1)])
def test_an_axis_may_be_part_of_a_row_of_chips(sizes):
    chips = [TorusChip(i) for i in range(64)]
    mesh = sharding.make_mesh(MeshConfig(*sizes), chips)
    assert mesh.devices.shape == sizes
    assert set(mesh.devices.flat) == set(chips)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_an_axis_that_slices_do_not_divide_is_refused():
    chips = [Chip(i) for i in range(8)]
    expected = (
        "mesh.data 1 is not divisible by the 2 slices that it spans (mesh.dcn); make it a multiple "
        "of 2, or set mesh.dcn to fsdp"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        sharding.make_mesh(MeshConfig(data=1, fsdp=8), chips)
    sharding.make_mesh(MeshConfig(data=1, fsdp=8, dcn="fsdp"), chips)  # The remedy works.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=4), "4 x 1 x 1 x 1 does not fit 8 devices; their product must be 8, and "),
        (MeshConfig(fsdp=3), "-1 x 3 x 1 x 1 does not fit 8 devices; their product must divide 8"),
        (MeshConfig(1, fsdp=16), "1 x 16 x 1 x 1 does not fit 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=f"^mesh data x fsdp x sequence x model = {message}"):
        sharding.make_mesh(config)


def test_partition_spec():
    def spec(*axes, **changes):
        return sharding.partition_spec(axes, AxisRules(**changes))

    assert spec("batch", "length", "heads") == PartitionSpec(("data", "fsdp"), "sequence", "model")
    assert spec("vocab", "embed") == PartitionSpec("model", "fsdp")
    assert spec(None, "embed") == PartitionSpec(None, "fsdp")
    # A mesh axis splits one dimension only: the first that wants it.
    assert spec("heads", "mlp") == PartitionSpec("model", None)
    assert spec("batch", "activation_embed", activation_embed="fsdp") == PartitionSpec(
        ("data", "fsdp"), None
    )
    assert spec("batch", batch=None) == PartitionSpec(None)
    with pytest.raises(ValueError, match="no logical axis 'head'; did you mean heads?"):
        spec("head")
    with pytest.raises(ValueError, match="no logical axis 'xyz'; known are batch, length, "):
        spec("xyz")


def test_a_mesh_that_does_not_divide_the_heads_is_refused():
    model = dataclasses.replace(MODEL, num_heads=3)
    shapes, axes = api.param_shapes(model), api.param_axes(model)
    expected = (
        "parameter decoder/layers/cross_attention/key/kernel: dimension 2 (heads, 3) is not "
        "divisible by the 2 devices of mesh axis model; choose a mesh that divides it, or set "
        "axes.heads to None"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        sharding.param_shardings(axes, shapes, mesh_of(model=2), RULES)
    # The remedy works.
    sharding.param_shardings(axes, shapes, mesh_of(model=2), AxisRules(heads=None))


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    mesh = mesh_of(data=4, fsdp=2)
    expected = (
        "data.batch_size 30 is not divisible by data x fsdp = 8 devices; use 24 or 32, or set "
        "mesh.data or mesh.fsdp"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        sharding.check_batch_size(30, mesh, RULES)
    with pytest.raises(ValueError, match="eval.batch_size 5 is not .* use 8, or set"):
        sharding.check_batch_size(5, mesh, RULES, "eval.batch_size")
    with pytest.raises(ValueError, match="by data = 4 devices; use 4 or 8, or set mesh.data$"):
        sharding.check_batch_size(6, mesh, AxisRules(batch="data"))
    sharding.check_batch_size(32, mesh, RULES)
    sharding.check_batch_size(30, mesh_of(model=8), RULES)
    sharding.check_batch_size(30, mesh, AxisRules(batch=None))


def spec_of(kind, inputs, targets):
    return BatchSpec(8, inputs, targets, kind=kind)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (spec_of("encoder_decoder", 510, 112), "data.inputs_length 510 .* use 508 or 512, or set"),
        (spec_of("encoder_decoder", 512, 114), "data.targets_length 114 .* use 112 or 116"),
        (spec_of("encoder", 3, 4), "data.inputs_length 3 .*; use 4, or set mesh.sequence$"),
        (spec_of("decoder", 0, 6), "data.targets_length 6 is not divisible by sequence = 4 dev"),
        (
            spec_of("prefix_lm", 6, 4),
            r"data.inputs_length \+ data.targets_length = 6 \+ 4 = 10 is not .* use 8 or 12",
        ),
    ],
)
def test_lengths_that_the_devices_do_not_divide_are_refused(spec, message):
    mesh = mesh_of(sequence=4)
    with pytest.raises(ValueError, match=message):
        sharding.check_lengths(spec, mesh, RULES)
    sharding.check_lengths(spec, mesh_of(model=8), RULES)
    sharding.check_lengths(spec, mesh, AxisRules(length=None))


def test_lengths_that_the_devices_divide_are_not_refused():
    for spec in (
        spec_of("encoder_decoder", 512, 116),
        spec_of("encoder", 4, 3),  # Its targets are as long as its inputs.
        spec_of("decoder", 6, 2),
        spec_of("decoder", 0, 4),
    ):
        sharding.check_lengths(spec, mesh_of(sequence=4), RULES)


def test_a_length_that_the_devices_do_not_divide_stays_whole():
    mesh = mesh_of(data=2, sequence=4)
    x = np.zeros((2, 7), np.int32)
    assert sharding.shard_batch({"x": x}, mesh, RULES)["x"].sharding.shard_shape((2, 7)) == (1, 7)
    with sharding.use_mesh(mesh):
        got = jax.jit(lambda x: sharding.constrain(x, "batch", "length"))(x)
        assert got.sharding.shard_shape(x.shape) == (1, 7)
        assert sharding.local_size((2, 7), "batch", "length") == 7
        assert sharding.local_size((2, 8), "batch", "length") == 2


def test_shard_batch_splits_rows():
    batch = random_batch(MODEL, rows=16)
    mesh = mesh_of(2, 2, 2)
    arrays = sharding.shard_batch(batch, mesh, RULES)
    for name, x in arrays.items():
        assert x.dtype == batch[name].dtype
        np.testing.assert_array_equal(x, batch[name])
        assert x.sharding.shard_shape(x.shape) == (4, *x.shape[1:])


@pytest.mark.slow
def test_two_processes_put_their_own_rows_together():
    program = """
    import sys
    import jax
    import numpy as np
    from t5jax import sharding
    from t5jax.config import AxisRules, MeshConfig

    process, port = int(sys.argv[1]), sys.argv[2]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    # Devices of both processes in turns, so that a process has rows that are not neighbours.
    devices = sorted(jax.devices(), key=lambda d: (d.id % 4, d.process_index))
    shape = (4, 1, 1, 2) if sys.argv[3] == "shared" else (8, 1, 1, 1)
    auto = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), sharding.MESH_AXES, axis_types=auto)
    whole = {"x": np.arange(48).reshape(16, 3)}
    rows = sharding.process_rows(16, mesh, AxisRules())
    part = {name: x[rows] for name, x in whole.items()}
    arrays = sharding.shard_batch(part, mesh, AxisRules(), 16)
    weighted = jax.jit(lambda x: (x * (1 + np.arange(16))[:, None]).sum())(arrays["x"])
    if sys.argv[3] == "split":
        from t5jax.distributed import from_first_process

        # What the first one finds on its disk holds for all, and so does what stops it.
        assert from_first_process(lambda: {"found": [process]}) == {"found": [0]}
        try:
            from_first_process(lambda: int("none" if process == 0 else "1"))
        except ValueError as error:
            assert "none" in str(error)
        else:
            raise AssertionError("the second process went on alone")
    print(rows, int(weighted), arrays["x"].shape)
    """
    expected = (np.arange(48).reshape(16, 3) * (1 + np.arange(16))[:, None]).sum()
    for layout, rows in [
        # Two devices of different processes share each row, or each process has pairs of rows.
        ("shared", [list(range(16))] * 2),
        ("split", [[i for i in range(16) if i // 2 % 2 == process] for process in range(2)]),
    ]:
        port = str(free_port())
        words = ["-c", textwrap.dedent(program)]
        runs = [
            Process(*words, process, port, layout, env=environment(devices=4))
            for process in range(2)
        ]
        for run, expected_rows in zip(runs, rows, strict=True):
            ended = run.wait()
            last = ended.out.splitlines()[-1:]
            assert last == [f"{expected_rows} {expected} (16, 3)"], ended.err
