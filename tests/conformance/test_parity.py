"""Every network against transformers' on torch, from random weights; both ways.

What is written here loads there without a missing or unexpected key, and gives the same outputs,
loss and greedy tokens; what is written there of it loads here bit for bit.
"""

import json
import os

import jax
import numpy as np
import pytest

from conformance.cases import (
    ALONE,
    HIDDEN,
    LOGITS,
    assert_same,
    fast_first,
    is_real,
    output_sample,
    pack,
    random_examples,
    random_params,
    without_segments,
)
from conformance.families import FAST, VARIANTS
from golden import FOLDER
from t5jax import batch as features
from t5jax import decoding
from t5jax.config import LossConfig
from t5jax.hf import io
from t5jax.losses import batch_loss

torch = pytest.importorskip("torch", reason="transformers' models run on torch")
transformers = pytest.importorskip("transformers", reason="what is compared with")
pytestmark = [
    pytest.mark.hf,
    pytest.mark.filterwarnings("ignore:a Llama whose heads"),
]
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # For models this small a second thread only waits.

NLL = jax.jit(
    lambda model, params, batch: batch_loss(model, params, batch, LossConfig(z_loss=0.0))[1],
    static_argnums=0,
)


def load_there(folder):
    """Returns transformers' model of a folder, of which it must have nothing to say."""
    raw = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, raw["architectures"][0])
    options = {"attn_implementation": "eager"}  # The only one that caps scores.
    if raw["architectures"] == ["BertModel"]:
        options["add_pooling_layer"] = not folder.name.endswith("none")
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert {what: list(keys) for what, keys in info.items() if keys} == {}
    assert model.dtype == torch.float32
    if raw["model_type"] == "umt5":
        # It was trained without scaled outputs; transformers scales where its config says tied,
        # which since version 5 it always does.
        model.config.tie_word_embeddings = False
    return model.eval()


def their_outputs(model, theirs, batch):
    """Returns what our logits or hidden values are to be, [B, T, V], and the loss or None."""
    inputs = {}
    if model.kind == "decoder":
        # Labels are shifted there: a text with its last target is given whole.
        ids = batch[features.DECODER_INPUT_TOKENS]
        real = batch[features.DECODER_SEGMENT_IDS] > 0
        ids, real = (np.pad(x, ((0, 0), (0, 1))) for x in (ids, real))
        for row, size in enumerate(real.sum(axis=1)):
            ids[row, size] = batch[features.DECODER_TARGET_TOKENS][row, size - 1]
            real[row, size] = True
        inputs = {"input_ids": ids, "attention_mask": real, "labels": np.where(real, ids, -100)}
    else:
        ids = batch[features.ENCODER_INPUT_TOKENS]
        inputs = {"input_ids": ids, "attention_mask": ids != model.pad_token_id}
    if model.kind == "encoder_decoder":
        inputs["decoder_input_ids"] = batch[features.DECODER_INPUT_TOKENS]
    side = "encoder" if model.kind == "encoder" else "decoder"
    if model.num_outputs and model.kind != "decoder":
        asked, labels = (batch[f"{side}_{name}"] for name in ("loss_weights", "target_tokens"))
        inputs["labels"] = np.where(asked > 0, labels, -100)
    by_text = model.head == "sequence_classification"
    if by_text:
        inputs["labels"] = inputs["labels"][:, 0]
    with torch.no_grad():
        out = theirs(**{name: torch.tensor(x).long() for name, x in inputs.items()})
    if not model.num_outputs:
        pooled = model.head == "pooler"
        outputs = out.pooler_output[:, None] if pooled else out.last_hidden_state
        return outputs.numpy(), None
    outputs = out.logits.numpy()
    return (outputs[:, None] if by_text else outputs), out.loss.item()


def their_greedy(model, theirs, prompts, steps):
    """Tokens after prompts that are padded behind for an encoder, in front for a decoder."""
    length, decodes = max(map(len, prompts)), model.kind == "decoder"
    ids = np.full((len(prompts), length), model.pad_token_id)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        span = slice(length - len(prompt), None) if decodes else slice(len(prompt))
        ids[row, span], mask[row, span] = prompt, 1
    tokens = theirs.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        # With its cache, transformers fails where T5's decoder is deeper than the encoder.
        use_cache=model.family != "t5",
    ).numpy()[:, length if decodes else 1 :]
    pad = ((0, 0), (0, steps - tokens.shape[1]))
    return np.pad(tokens, pad, constant_values=model.pad_token_id)


@fast_first(*VARIANTS)
def test_the_same_there_and_back(variant, tmp_path):
    model = VARIANTS[variant]
    params, examples = random_params(model), random_examples(model)
    ours_folder = tmp_path / variant
    io.save_params(ours_folder, model, params, max_shard_bytes=20_000)
    theirs = load_there(ours_folder)
    batch = pack(model, examples, ALONE)
    real, plain = is_real(model, batch), without_segments(batch)

    expected, their_loss = their_outputs(model, theirs, batch)
    expected = np.pad(expected, ((0, 0), (0, max(0, real.shape[1] - expected.shape[1])), (0, 0)))
    expected = expected[:, : real.shape[1]]
    ours = np.asarray((LOGITS if model.num_outputs else HIDDEN)(model, params, plain))
    assert ours.shape == expected.shape
    assert expected[real].std() > 0.05  # The comparison can fail.
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-4, rtol=1e-4)
    write_down(variant, output_sample(model, expected, batch))
    if model.num_outputs and variant in FAST:
        sums = NLL(model, params, plain)
        np.testing.assert_allclose(sums["nll"] / sums["tokens"], their_loss, rtol=2e-5)

    if model.kind != "encoder":
        name = f"{'decoder' if model.kind == 'decoder' else 'encoder'}_input_tokens"
        prompts = [example[name][:9].tolist() for example in examples[:4]]
        prompt_batch = features.prompt_batch(prompts, model.kind, 4, 9)
        if model.kind != "decoder":
            prompt_batch = without_segments(pack(model, examples, ALONE[:4]))
            prompt_batch = {name: prompt_batch[name]}
            prompts = [example[name].tolist() for example in examples[:4]]
        tokens = np.asarray(decoding.greedy(model, params, prompt_batch, 10))
        assert len(np.unique(tokens)) > 2 or variant not in FAST
        np.testing.assert_array_equal(tokens, their_greedy(model, theirs, prompts, 10))

    theirs.save_pretrained(tmp_path / "theirs")
    assert io.read_config(tmp_path / "theirs") == model
    assert_same(io.load_params(tmp_path / "theirs", model), params)


def write_down(variant, sample):
    """Compares with what test_numerics.py compares with, or keeps it there if asked to."""
    path = FOLDER / "outputs.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if os.environ.get("T5JAX_UPDATE_GOLDEN"):
        kept[variant] = [round(float(x), 5) for x in sample]
        lines = (
            f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in VARIANTS if name in kept
        )
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    np.testing.assert_allclose(sample, kept[variant], atol=2e-4, rtol=1e-4)
