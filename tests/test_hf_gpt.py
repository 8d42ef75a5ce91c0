"""Decoder-only networks against transformers', from random weights of small configs of each family.

Both ways: a folder that transformers wrote gives the same logits, loss and greedy tokens here, for
padded rows, packed rows and padded prompts; one written here loads there without a word about keys.
"""

import jax
import numpy as np
import pytest

from small_gpt import VARIANTS, pack, random_params, random_texts
from t5jax import batch as features
from t5jax import decoding
from t5jax.hf import io
from t5jax.models import api

torch = pytest.importorskip("torch", reason="transformers' models run on torch")
transformers = pytest.importorskip("transformers", reason="what is compared with")
pytestmark = pytest.mark.hf
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # For models this small a second thread only waits.

LENGTH = 26  # Of the longest text; the two others fill one packed row.
LOGITS = jax.jit(api.logits, static_argnums=0)
ACTIVATIONS = {"gelu": "gelu_new", "gelu-exact": "gelu", "relu": "relu"}

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def their_config(config):
    """transformers' description of the same network."""
    tokens = {
        "bos_token_id": config.decoder_start_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn_implementation": "eager",  # The only one that caps scores.
    }
    if config.family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.d_model,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_inner=config.d_ff,
            n_positions=config.max_positions,
            activation_function=ACTIVATIONS[config.mlp_activation],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **tokens,
        )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_scaling_factor}
    if config.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": config.rope_low_frequency_factor,
            "high_freq_factor": config.rope_high_frequency_factor,
            "original_max_position_embeddings": config.rope_original_max_positions,
        }
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": config.attention_bias,
        **tokens,
    }
    layers = ["sliding_attention" if local else "full_attention" for local in config.local_layers]
    if config.family == "llama":
        return transformers.LlamaConfig(rope_parameters=rope, mlp_bias=config.mlp_bias, **shape)
    if config.family == "mistral":
        return transformers.MistralConfig(
            rope_parameters=rope, sliding_window=config.sliding_window, **shape
        )
    if config.family == "qwen3":
        return transformers.Qwen3Config(
            rope_parameters=rope,
            use_sliding_window=any(config.local_layers),
            sliding_window=config.sliding_window,
            layer_types=layers,
            **shape,
        )
    shape |= {
        "query_pre_attn_scalar": config.query_pre_attention_scalar or config.head_dim,
        "final_logit_softcapping": config.final_softcap,
        "sliding_window": config.sliding_window or 4096,
        "layer_types": layers,
    }
    if config.family == "gemma2":
        caps = {"attn_logit_softcapping": config.attention_softcap}
        return transformers.Gemma2Config(rope_parameters=rope, **caps, **shape)
    local = {"rope_type": "default", "rope_theta": config.rope_local_theta or 10_000.0}
    rope = {"full_attention": rope, "sliding_attention": local}
    return transformers.Gemma3TextConfig(rope_parameters=rope, **shape)


def their_model(config):
    """transformers' model with random weights, all of which matter."""
    model = transformers.AutoModelForCausalLM.from_config(their_config(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(torch.randn(x.shape, generator=generator) * 0.3)
            if ("norm" in name or "ln_" in name) and name.endswith("weight"):
                x.add_(0 if config.norm_plus_one else 1)
    return model.eval()


def their_logits(model, texts) -> list[np.ndarray]:
    """Of each text alone, [T, V]."""
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor(text[None, :-1]).long()).logits[0].numpy()
            for text in texts
        ]


def their_greedy(model, prompts, steps, **options):
    """Of prompts padded in front, as ours are."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    tokens = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        **options,
    ).numpy()[:, length:]
    pad = model.generation_config.pad_token_id
    return np.pad(tokens, ((0, 0), (0, steps - tokens.shape[1])), constant_values=pad)


def our_greedy(config, params, prompts, steps):
    length = max(map(len, prompts))
    batch = features.prompt_batch(prompts, "decoder", len(prompts), length)
    return np.asarray(decoding.greedy(config, params, batch, steps))


@every_variant
def test_their_folder_computes_the_same_here(variant, tmp_path):
    model = their_model(VARIANTS[variant])
    model.save_pretrained(tmp_path)
    config = io.read_config(tmp_path)
    assert config == VARIANTS[variant]
    params = io.load_params(tmp_path, config)

    texts = random_texts(config, lengths=(15, 13, 27))
    theirs = their_logits(model, texts)
    assert theirs[0].std() > 0.05  # The comparison can fail.
    padded = pack(texts, [[0], [1], [2]], LENGTH)
    packed = pack(texts, [[0, 1], [1, 0], [2]], LENGTH)
    for batch, places in (
        (padded, [(0, 0, 0), (1, 1, 0), (2, 2, 0)]),
        (packed, [(0, 0, 0), (1, 0, 14), (1, 1, 0), (0, 1, 12), (2, 2, 0)]),
    ):
        ours = np.asarray(LOGITS(config, params, batch))
        for text, row, start in places:
            expected = theirs[text]
            got = ours[row, start : start + len(expected)]
            np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)

    # Their loss is of rows as wide as the longest, in which labels of -100 do not count.
    ids = torch.tensor(padded[features.DECODER_INPUT_TOKENS]).long()
    mask = torch.tensor(padded[features.DECODER_SEGMENT_IDS] != 0)
    with torch.no_grad():
        labels = ids.masked_fill(~mask, -100)
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.item()
    # The last target of each text is no input, and so has no label there.
    weights = padded[features.DECODER_LOSS_WEIGHTS]
    for row, text in enumerate(texts):
        weights[row, len(text) - 2] = 0
    log_probs = jax.nn.log_softmax(LOGITS(config, params, padded))
    targets = padded[features.DECODER_TARGET_TOKENS]
    nll = -np.take_along_axis(np.asarray(log_probs), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose((nll * weights).sum() / weights.sum(), loss, rtol=1e-5)

    prompts = [text[:n].tolist() for text, n in zip(texts, (9, 4, 7), strict=True)]
    tokens = our_greedy(config, params, prompts, 10)
    np.testing.assert_array_equal(tokens, their_greedy(model, prompts, 10))


@every_variant
def test_our_folder_computes_the_same_there(variant, tmp_path):
    config = VARIANTS[variant]
    params = random_params(config)
    io.save_params(tmp_path / "out", config, params, max_shard_bytes=20_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    assert model.dtype == torch.float32

    texts = random_texts(config, lengths=(15, 13, 27))
    ours = np.asarray(LOGITS(config, params, pack(texts, [[0, 1], [1, 0], [2]], LENGTH)))
    theirs = their_logits(model.eval(), texts)
    assert theirs[0].std() > 0.05
    for text, row, start in ((0, 0, 0), (1, 0, 14), (2, 2, 0)):
        expected = theirs[text]
        got = ours[row, start : start + len(expected)]
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_the_text_model_is_taken_out_of_their_gemma_with_images(tmp_path):
    config = VARIANTS["gemma3"]
    text, vision = their_config(config), {"hidden_size": 8, "intermediate_size": 8}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    around = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config={"model_type": "siglip_vision_model", **vision},
        mm_tokens_per_image=4,
        **{name: 60 for name in ("boi_token_index", "eoi_token_index", "image_token_index")},
        **{key: getattr(text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    model = transformers.Gemma3ForConditionalGeneration(around).eval()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="its text model is taken"):
        assert io.read_config(tmp_path) == config
    params = io.load_params(tmp_path, config)
    texts = [text % 60 for text in random_texts(config, lengths=(27, 27))]  # No image among them.
    theirs = their_logits(model, texts)
    batch = {features.DECODER_INPUT_TOKENS: np.stack(texts)[:, :-1]}
    np.testing.assert_allclose(LOGITS(config, params, batch), theirs, atol=1e-4, rtol=1e-4)
