"""The estimate of a compiled text, against texts whose cost is worked out by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from t5jax.architectures import T5Config, published
from t5jax.batch import BatchSpec
from t5jax.plan import hlo
from t5jax.plan.chips import CHIPS, Chip, links, peak_flops
from t5jax.plan.cost import cost, place
from t5jax.plan.flops import step_flops

# A cycle a second, a FLOP a second, and so on: seconds can be read from the text.
CHIP = Chip("slow", 1.0, 1.0, 1e9, 1.0, 1.0, 1.0, 1, 2)
FUSED = (
    'metadata={op_name="jit(step)/transpose(jvp(Network.hidden))/Network.encode/encoder/while/body/'
    'closed_call/checkpoint/layers/mlp/wi_0/...A,AD->...D/dot_general" stack_frame_id=3}, '
    'backend_config={"window_config":{"estimated_cycles":"5"}}'
)
LOOP = f"""
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[]{{:T(128)}}, f32[4]{{0:T(128)}}) parameter(0)
  ROOT %f = (s32[]{{:T(128)}}, f32[4]{{0:T(128)S(1)}}) fusion(%p), kind=kLoop, calls=%c, {FUSED}
}}

%condition (q: (s32[], f32[4])) -> pred[] {{
  %constant.7 = s32[]{{:T(128)}} constant(12)
  %q = (s32[]{{:T(128)}}, f32[4]{{0:T(128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %constant.7), direction=LT
}}
"""


def estimate(entry, above="", chip=CHIP, shape=(4, 4)):
    text = f"HloModule jit_step, is_scheduled=true\n{above}\nENTRY %main.1 (a: f32[]) -> f32[] {{\n"
    text += "".join(f"  {line}\n" for line in entry) + "}\n"
    return cost(hlo.parse(text), chip, shape)


def fusion(name, cycles):
    return f'%{name} = f32[2]{{0}} fusion(%a), backend_config={{"estimated_cycles":"{cycles}"}}'


def test_a_loop_costs_its_body_times_its_rounds():
    found = estimate(
        [
            fusion("one", 100),
            "%w = (s32[], f32[4]) while(%one), condition=%condition, body=%body",
            fusion("two", 40),
        ],
        LOOP,
    )
    assert found.seconds == 100 + 12 * 5 + 40
    first, second = found.operations
    assert (first.place, first.seconds, first.count) == ("without a name", 140, 2)
    assert second.place == "encoder/layers/mlp/wi_0 (backward)"
    assert (second.seconds, second.count) == (60, 12)


def test_a_loop_of_unknown_length_is_named():
    found = estimate(["%w = (s32[]) while(%a), condition=%nowhere, body=%body"], LOOP)
    assert found.seconds == 5
    assert found.unpriced == ["a loop of unknown length in without a name"]


def test_a_kernel_is_charged_by_what_it_says_and_else_by_its_bytes():
    kernel = (
        '%k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(step)/attention/flash"}, backend_config={"custom_call_config":'
        '{"body":"TUzvU=","cost_estimate":{"flops":COST,"transcendentals":"7",'
        '"bytes_accessed":"9"}}}'
    )
    assert estimate([kernel.replace("COST", '"30"')]).kernels == 30
    bytes_bound = estimate([kernel.replace("COST", "3")])
    assert (bytes_bound.seconds, bytes_bound.kernels) == (9, 9)
    assert not bytes_bound.unpriced
    silent = estimate([kernel.split(", backend_config")[0]])
    assert silent.seconds == 2 * 8 * 4
    assert silent.unpriced == ["a kernel in attention without a cost_estimate"]


# In a group of 4 of 16 devices, along one dimension of 4: two links.
GROUPS = [
    "{{0,1,2,3},{4,5,6,7}}",
    "[4,4]<=[16]",
    "mesh['axis_0'=4,'axis_1'=4] {'axis_1'}",
    "mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_0'}",
]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    ("kind", "size"),  # Bytes that a device receives, of a result of 64 bytes.
    [
        ("all-gather", 48),
        ("all-reduce", 96),
        ("reduce-scatter", 192),
        ("all-to-all", 48),
        ("collective-permute", 64),
    ],
)
def test_collectives(kind, size, groups):
    found = estimate([f"%c = bf16[4,8]{{1,0:T(8,128)}} {kind}(%a), replica_groups={groups}, x=1"])
    (one,) = found.collectives
    assert (one.kind, one.network, one.count, one.bytes) == (kind, "ICI", 1, size)
    assert found.seconds == found.waiting == size / 2


def test_a_reduce_scatter_is_a_fusion_of_a_sum_and_its_part():
    above = """
%all-reduce-scatter.1 (input: bf16[16,8]) -> bf16[4,8] {
  %input = bf16[16,8]{1,0} parameter(0)
  %all-reduce.2 = bf16[16,8]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.3 = bf16[4,8]{1,0} dynamic-slice(%all-reduce.2), dynamic_slice_sizes={4,8}
}
"""
    fused = "%f = bf16[4,8]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1"
    found = estimate([fused], above)
    (one,) = found.collectives
    assert (one.kind, one.network, one.count, one.bytes) == ("reduce-scatter", "ICI", 1, 3 * 64)
    assert found.seconds == found.waiting == 3 * 64 / 2
    # A fusion that computes is none.
    assert not estimate([fused.replace("all-reduce-scatter.1", "body")], LOOP).collectives


def test_what_computation_hides_is_not_waited_for():
    start = (
        "%s = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions"
    )
    done = "%d = f32[16]{0} all-gather-done(%s)"
    gather = 48 / 2
    assert estimate([start, done, fusion("f", 100)]).waiting == gather
    assert estimate([start, fusion("f", 100), done]).waiting == 0
    assert estimate([start, fusion("f", 10), done]).seconds == gather
    # Two share the links.
    second = [start.replace("%s", "%s2"), done.replace("%s", "%s2").replace("%d", "%d2")]
    assert estimate([start, second[0], done, second[1]]).seconds == 2 * gather


def test_between_slices():
    chip = dataclasses.replace(CHIP, dcn_rate=0.5)
    transfer = (
        'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = [
        f"%send = (bf16[10]{{0}}, u32[], token[]) send(%a, %b), channel_id=2, {transfer}",
        f"%recv = (bf16[10]{{0}}, u32[], token[]) recv(%b), channel_id=1, {transfer}",
        fusion("f", 15),
        "%recv-done = (bf16[10]{0}, token[]) recv-done(%recv), channel_id=1",
    ]
    found = estimate(lines, chip=chip)
    (one,) = found.collectives
    assert (one.kind, one.network, one.bytes, one.seconds) == ("all-reduce", "DCN", 20, 40)
    assert (found.seconds, found.waiting) == (40, 25)


def test_links_of_a_group():
    assert links((4, 4, 4), 4) == 2
    assert links((4, 4, 4), 16) == 4
    assert links((4, 4, 4), 64) == 6
    assert links((2, 2), 1) == 2


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("", "without a name"),
        ("jit(step)/optimizer/sqrt", "optimizer"),
        ("jit(step)/jvp()/while/body/closed_call/lm_head/...D,DV->...V/dot_general", "lm_head"),
        (
            "jit(step)/jvp(Network.hidden)/Network.encode/encoder/while/body/closed_call/layers/"
            "attention/attention.keys_values/value/...A,ADE->...DE/dot_general",
            "encoder/layers/attention/value",
        ),
        (
            "jit(step)/transpose(jvp(Network.hidden))/decoder/while/body/closed_call/checkpoint/"
            "rematted_computation/layers/mlp/wi_0/mul",
            "decoder/layers/mlp/wi_0 (recomputed)",
        ),
    ],
)
def test_places(op_name, expected):
    assert place(op_name) == expected


def test_rates_agree_with_what_a_chip_computes_per_cycle():
    """Matrix units of 128 x 128 or 256 x 256, two FLOPs each per cycle."""
    units = {"v4": 8, "v5e": 4, "v5p": 8, "v6e": 16, "tpu7x": 16}
    for name, number in units.items():
        chip = CHIPS[name]
        assert chip.peak_flops / chip.clock == pytest.approx(number * 2 * 128**2, rel=0.01), name


def test_flops_by_hand():
    model = T5Config(
        vocab_size=128,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_heads=3,
        num_encoder_layers=5,
        num_decoder_layers=2,
        remat="full",
        relative_attention_num_buckets=32,
    )
    B, S, T, D, HK, F, V = 4, 12, 6, 16, 24, 32, 128
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, (shape, dtype) in BatchSpec(B, S, T).features().items()
    }
    encoder = S * (4 * D * HK + 3 * D * F) + 2 * S * S * HK
    decoder = T * (4 * D * HK + 3 * D * F) + 2 * T * T * HK
    cross = T * 2 * D * HK + S * 2 * D * HK + 2 * T * S * HK
    head = T * D * V
    bias = 3 * 32 * ((2 * S - 1) + (2 * T - 1))  # One-hot distances by the table, once per stack.
    products = B * (5 * encoder + 2 * (decoder + cross) + head) + bias
    assert step_flops(model, batch) == 3 * 2 * products


def test_a_published_model_needs_six_flops_per_parameter_and_token():
    model = published("llama3_8b")
    length = 64
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, (shape, dtype) in BatchSpec(1, 0, length, kind="decoder").features().items()
    }
    params = 8_030_261_248 - 128256 * 4096  # Without the embedding, which is a look-up.
    scores = 32 * 2 * length * length * 32 * 128
    assert step_flops(model, batch) == pytest.approx(6 * (params * length + scores), rel=1e-3)
    assert math.isfinite(jnp.float32(step_flops(model, batch)))


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v4", 275e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_known_or_none(kind, peak):
    assert peak_flops(kind) == peak
