"""The mapping of tensors: layouts both ways, names picked by hand, and equality bit for bit."""

import numpy as np
import safetensors.numpy

from conformance.cases import random_params
from conformance.families import GEMMA3, GPT2, T5
from t5jax.hf import io, mapping
from t5jax.hf.mapping import Part, Rearrange


def written(folder, model):
    """Returns their tensors of random parameters, and ours."""
    params = random_params(model)
    io.save_params(folder / model.family, model, params)
    path = folder / model.family / "model.safetensors"
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    return safetensors.numpy.load_file(path), params


def test_rearrange_reads_any_slice_and_inverts():
    rng = np.random.default_rng(0)
    for pattern, shape in (("(h k) d -> d h k", (5, 3, 4)), ("d (h k) -> h k d", (3, 4, 5))):
        ours = rng.standard_normal(shape)
        view = Rearrange(pattern)
        theirs = view.to_theirs(ours)
        assert (
            theirs.shape
            == view.their_shape(shape)
            == ((12, 5) if "(h k) d " in pattern else (5, 12))
        )
        assert theirs.flags.c_contiguous
        for _ in range(20):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(view.read(theirs, index, shape), ours[index])


def test_parts_of_a_tensor_are_read_in_any_slice():
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((5, 3 * 12))
    for place in range(3):
        view = Part(Rearrange("d (h k) -> d h k"), axis=1, place=place, count=3)
        ours = theirs[:, 12 * place : 12 * place + 12].reshape(5, 3, 4)
        assert view.their_shape((5, 3, 4)) == theirs.shape
        np.testing.assert_array_equal(view.to_theirs(ours), ours.reshape(5, 12))
        for _ in range(20):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in (5, 3, 4)]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(view.read(theirs, index, (5, 3, 4)), ours[index])


def test_same_values_compares_all_bits():
    a = np.array([[1.0, np.nan]], "float32")
    assert mapping.same_values(a, a.copy())
    assert not mapping.same_values(a, np.array([[1.0, 2.0]], "float32"))
    assert not mapping.same_values(a, a.astype("float64"))
    # Beyond the first rows that are in memory at a time.
    large = np.zeros((2, 2**22), "int8")
    other = large.copy()
    assert mapping.same_values(large, other)
    other[1, 5] = 1
    assert not mapping.same_values(large, other)


def test_names_and_layouts_are_theirs(tmp_path):
    theirs, ours = written(tmp_path, T5)
    np.testing.assert_array_equal(
        theirs["decoder.block.1.layer.1.EncDecAttention.q.weight"],
        ours["decoder"]["layers"]["cross_attention"]["query"]["kernel"][1].reshape(12, 15).T,
    )
    np.testing.assert_array_equal(
        theirs["encoder.block.1.layer.0.SelfAttention.o.weight"],
        ours["encoder"]["layers"]["attention"]["out"]["kernel"][1].reshape(15, 12).T,
    )
    np.testing.assert_array_equal(
        theirs["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
        ours["encoder"]["relative_bias"]["embedding"].T,
    )
    np.testing.assert_array_equal(
        theirs["decoder.block.0.layer.2.layer_norm.weight"],
        ours["decoder"]["layers"]["pre_mlp_norm"]["scale"][0],
    )

    theirs, ours = written(tmp_path, GPT2)
    attention = ours["decoder"]["layers"]["attention"]
    for place, part in enumerate(("query", "key", "value")):
        span = slice(12 * place, 12 * place + 12)
        np.testing.assert_array_equal(
            theirs["transformer.h.1.attn.c_attn.weight"][:, span],
            attention[part]["kernel"][1].reshape(12, 12),
        )
        np.testing.assert_array_equal(
            theirs["transformer.h.1.attn.c_attn.bias"][span], attention[part]["bias"][1].reshape(12)
        )
    np.testing.assert_array_equal(
        theirs["transformer.h.0.attn.c_proj.weight"], attention["out"]["kernel"][0].reshape(12, 12)
    )
    assert theirs["transformer.h.0.mlp.c_fc.weight"].shape == (12, 20)
    assert "lm_head.weight" not in theirs

    theirs, ours = written(tmp_path, GEMMA3)
    layers = ours["decoder"]["layers"]
    for name, leaf in (
        ("post_attention_layernorm", layers["post_attention_norm"]["scale"]),
        ("pre_feedforward_layernorm", layers["pre_mlp_norm"]["scale"]),
        ("self_attn.q_norm", layers["attention"]["query_norm"]["scale"]),
    ):
        np.testing.assert_array_equal(theirs[f"model.layers.2.{name}.weight"], leaf[2])
    np.testing.assert_array_equal(
        theirs["model.layers.3.self_attn.q_proj.weight"],
        layers["attention"]["query"]["kernel"][3].reshape(12, 18).T,
    )
    np.testing.assert_array_equal(
        theirs["model.layers.0.mlp.gate_proj.weight"], layers["mlp"]["wi_0"]["kernel"][0].T
    )
