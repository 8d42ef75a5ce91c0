"""The kernels compiled for TPUs that are not there, by libtpu; part of the extra `plan`."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5jax import sharding
from t5jax.architectures import T5Config
from t5jax.batch import train_spec
from t5jax.config import Config, DataConfig, MeshConfig
from t5jax.losses import batch_loss
from t5jax.models import api
from t5jax.models.attention import AttentionMask, attention
from t5jax.plan import hlo
from t5jax.program import program
from tpu import needs_libtpu, squares, topology

pytestmark = needs_libtpu
SOURCE, TARGET = 384, 160  # No other sizes of the network below.


def kernels(text) -> list[str]:
    return re.findall(r'custom_call_target="tpu_custom_call".*?"flops":"?(\d+)', text)


@pytest.mark.parametrize(
    ("chips", "case"),
    [
        ("v4:2x2x1", "t5"),
        ("v5e:2x2", "t5"),
        ("v5p:2x2x1", "t5"),
        ("v6e:2x2", "t5"),
        ("v4:2x2x1", "gemma"),  # The chip with the least memory for a kernel.
    ],
)
def test_kernels_compile(chips, case):
    mesh = sharding.make_mesh(MeshConfig(), topology(chips).devices[:1])
    where = NamedSharding(mesh, PartitionSpec())

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    if case == "t5":  # Several blocks, and lengths that are no multiples of 128.
        q, k, bias = array(2, 600, 3, 64), array(2, 600, 3, 64), array(3, 1199, dtype="float32")
        options = {}
    else:
        q, k, bias = array(2, 640, 4, 256), array(2, 640, 2, 256), None
        options = {"scale": 0.1, "softcap": 50.0}

    def loss(q, k, v, bias, ids, window):
        mask = AttentionMask.within(ids, causal=True, window=None if case == "t5" else window)
        return jnp.sum(attention(q, k, v, mask, bias=bias, **options).astype("float32"))

    with sharding.use_mesh(mesh):
        ids, window = array(2, q.shape[1], dtype="int32"), array(dtype="int32")
        arguments = [0, 1, 2] if bias is None else [0, 1, 2, 3]
        text = (
            jax.jit(jax.grad(loss, arguments)).lower(q, k, k, bias, ids, window).compile().as_text()
        )
    assert len(kernels(text)) == 2
    assert all(int(flops) > 0 for flops in kernels(text))


@pytest.mark.slow
def test_nothing_of_the_size_of_the_scores():
    """In the compiled loss and gradient of a T5 on four chips."""
    model = T5Config(
        vocab_size=512,
        d_model=128,
        d_kv=64,
        d_ff=256,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dtype="bfloat16",
        dropout_rate=0.1,
    )
    data = DataConfig(inputs_length=SOURCE, targets_length=TARGET, batch_size=4, pack=True)
    config = Config(model=model, data=data)
    run = program(
        config, sharding.make_mesh(MeshConfig(data=2, model=2), topology("v5e:2x2").devices)
    )
    state, batch = run.arguments(train_spec(config))

    def loss(params, batch):
        return batch_loss(model, params, batch, config.loss, dropout_rng=jax.random.key(0))[0]

    with run.use():
        assert api.attention_backend() == "flash"
        text = jax.jit(jax.grad(loss)).lower(state.params, batch).compile().as_text()
    assert len(kernels(text)) == 6  # Of three attentions and their gradients.
    assert not squares(hlo.parse(text), SOURCE, TARGET)
