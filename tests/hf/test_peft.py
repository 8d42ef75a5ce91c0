"""LoRA in PEFT's format against peft itself: what is written here and what is written there."""

import dataclasses
import fnmatch
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import t5jax
from conformance.families import VARIANTS
from t5jax import trees
from t5jax.adapters import lora, prompt
from t5jax.config import LoraConfig
from t5jax.hf import io
from t5jax.hf import peft as ours
from t5jax.models import api
from t5jax.source import find, read_adapters
from t5jax.tokenizers import ByteTokenizer

torch = pytest.importorskip("torch", reason="peft runs on torch")
peft = pytest.importorskip("peft", reason="what is compared with")
transformers = pytest.importorskip("transformers", reason="what peft adapts")
pytestmark = pytest.mark.hf
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

IDS = np.arange(6, 22).reshape(2, 8)
_FOLDERS: dict = {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def make(variant):
        """Returns a description, its random parameters and their folder."""
        if variant not in _FOLDERS:
            model = VARIANTS[variant]
            params = jax.jit(lambda: api.init_params(model, jax.random.key(0)))()
            params = jax.tree.map(lambda x: x + 0.01, params)
            folder = tmp_path_factory.mktemp("base") / variant
            io.save_params(folder, model, params)
            _FOLDERS[variant] = model, params, folder
        return _FOLDERS[variant]

    return make


def there(folder):
    raw = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, raw["architectures"][0])
    return kind.from_pretrained(folder, attn_implementation="eager").eval()


def their_logits(model):
    ids = torch.tensor(IDS)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits.numpy()


def our_logits(model, params):
    names = {
        "decoder": ["decoder_input_tokens"],
        "encoder": ["encoder_input_tokens"],
        "encoder_decoder": ["encoder_input_tokens", "decoder_input_tokens"],
    }[model.kind]
    run = jax.jit(lambda params: api.logits(model, params, {n: jnp.array(IDS) for n in names}))
    logits = run(params)
    return logits[:, 0] if getattr(model, "head", "") == "sequence_classification" else logits


def adapted(params, leaves):
    return jax.tree.map(
        jnp.asarray, trees.unflatten(trees.flatten(params) | {p: x for p, x in leaves.items()})
    )


def moved(leaves):
    rng = np.random.default_rng(0)
    return {
        path: x + 0.2 * rng.normal(size=x.shape).astype(np.float32)
        if path.rpartition("/")[2] in lora.TRAINED
        else x
        for path, x in leaves.items()
    }


HERE = {
    "t5_1_1": LoraConfig(
        rank=3,
        alpha=6,
        targets=("query", "wi_0", "lm_head"),
        rslora=True,
        train=("token_embedder/*",),
    ),
    "gpt2 dora": LoraConfig(rank=2, targets=("all-linear",), dora=True),
    "llama_scaled": LoraConfig(rank=2, targets=("query", "key", "out"), alphas=("key:7",)),
    "bert_sequence_classification": LoraConfig(
        rank=2, targets=("query", "value"), train=("classifier/*", "pooler/*")
    ),
    "bert_token_classification": LoraConfig(
        rank=2, targets=("query",), train=("*/query/bias", "*/mlp/wo/bias", "*/mlp_norm/*")
    ),
}


@pytest.mark.parametrize("case", HERE)
def test_written_here_peft_computes_the_same(folders, tmp_path, case):
    config = HERE[case]
    model, params, folder = folders(case.split()[0])
    start = trees.flatten(jax.device_get(lora.init(config, model, params, jax.random.key(1))))
    leaves = moved({path: start[path] for path in lora.leaves(config, model)})
    whole = {
        p: x + 0.1
        for p, x in start.items()
        if any(fnmatch.fnmatch(p, pattern) for pattern in config.train)
    }
    ours.save(tmp_path / "adapter", model, leaves | whole, str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|mismatch)")
        loaded = peft.PeftModel.from_pretrained(there(folder), tmp_path / "adapter")
    expected = their_logits(loaded)
    found = our_logits(model, adapted(params, leaves | whole))
    np.testing.assert_allclose(found, expected, atol=3e-5)
    assert np.abs(expected - our_logits(model, params)).max() > 1e-2
    # And back: the same parameters.
    read = ours.read(tmp_path / "adapter", model)
    if "gpt2" in case:  # Zeros between the parts of c_attn are not told from other values.
        np.testing.assert_allclose(our_logits(model, adapted(params, read)), expected, atol=3e-5)
    else:
        for path, x in (leaves | whole).items():
            np.testing.assert_allclose(read[path], x, rtol=1e-6, err_msg=path)


THERE = {
    "t5_1_1": {
        "target_modules": r".*decoder.*\.(q|wo)",
        "rank_pattern": {"SelfAttention.q": 4},
        "alpha_pattern": {r"decoder\.block\.1\..*wo": 5},
        "use_rslora": True,
    },
    "gpt2": {
        "target_modules": ["c_attn", "mlp.c_proj"],
        "layers_to_transform": [1],
        "fan_in_fan_out": True,
        "use_dora": True,
    },
    "llama_scaled": {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
    "bert_sequence_classification": {
        "task_type": "SEQ_CLS",
        "target_modules": ["query"],
        "bias": "lora_only",
    },
}


@pytest.mark.parametrize("case", THERE)
def test_written_there_computes_the_same_here(folders, tmp_path, case):
    model, params, folder = folders(case)
    torch.manual_seed(0)
    fields = {"r": 3, "lora_alpha": 4, **THERE[case]}
    made = peft.get_peft_model(there(folder), peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        for name, x in made.named_parameters():
            if x.requires_grad and "original" not in name:
                x += 0.1 * torch.randn(x.shape)
    expected = their_logits(made)
    made.save_pretrained(tmp_path / "adapter")
    leaves = ours.read(tmp_path / "adapter", model)
    params = adapted(params, leaves)
    np.testing.assert_allclose(our_logits(model, params), expected, atol=3e-5)
    if case == "gpt2":
        merged = lora.merge(model, params)
        np.testing.assert_allclose(our_logits(model, merged), expected, atol=3e-5)


@pytest.mark.parametrize("head", ["TOKEN_CLS", "SEQ_CLS"])
def test_a_classifier_that_was_trained_over_a_masked_language_model(folders, tmp_path, head):
    _, _, folder = folders("bert_masked_lm")
    kind = {"TOKEN_CLS": "Token", "SEQ_CLS": "Sequence"}[head]
    kind = getattr(transformers, f"BertFor{kind}Classification")
    torch.manual_seed(0)
    made = kind.from_pretrained(folder, num_labels=3, attn_implementation="eager")
    config = {"task_type": head, "target_modules": ["query"], "r": 2, "init_lora_weights": False}
    made = peft.get_peft_model(made, peft.LoraConfig(**config)).eval()
    made.save_pretrained(tmp_path / "adapter")
    source = find(str(tmp_path / "adapter"), base=str(folder))
    if head == "SEQ_CLS":  # Neither the base nor the adapter has the layer before a classifier.
        with pytest.raises(ValueError, match="adapter needs pooler/bias, pooler/kernel, which nei"):
            source.read()
        return
    assert source.model.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    model, params = source.read()
    np.testing.assert_allclose(our_logits(model, params), their_logits(made), atol=3e-5)
    assert source.missing(model) == []
    others = dataclasses.replace(model, labels=("a", "b"))
    assert source.missing(others) == ["classifier/bias", "classifier/kernel"]
    assert not {path for path in source.adapter(others) if path.startswith("classifier")}


def test_patterns_are_of_the_names_in_the_model_that_was_adapted(folders, tmp_path):
    model, _, folder = folders("llama_scaled")
    bare = transformers.AutoModel.from_pretrained(folder)
    patterns = {"^layers.0.self_attn.q_proj": 6}
    config = {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 4, "alpha_pattern": patterns}
    peft.get_peft_model(bare, peft.LoraConfig(**config)).save_pretrained(tmp_path)
    scales = ours.read(tmp_path, model)["decoder/layers/attention/query/lora_scale"]
    assert scales.tolist() == [3, *[2] * (model.num_layers - 1)]


TOKENS = [
    # The base, its tokens now, modules_to_save, and whether input and output are still one table.
    ("llama_scaled", 64, None, True),
    ("llama_scaled", 64, ["embed_tokens", "lm_head"], False),
    ("gpt2", None, ["lm_head"], False),
    ("bert_masked_lm", 58, None, True),
]


@pytest.mark.parametrize(("variant", "size", "saved", "tied"), TOKENS)
def test_tokens_that_were_added_or_trained(folders, tmp_path, variant, size, saved, tied):
    _, _, folder = folders(variant)
    torch.manual_seed(0)
    base = there(folder)
    if size:
        base.resize_token_embeddings(size)
    query = {"llama_scaled": "q_proj", "gpt2": "c_attn", "bert_masked_lm": "query"}[variant]
    config = {"r": 2, "target_modules": [query], "modules_to_save": saved}
    made = peft.get_peft_model(base, peft.LoraConfig(**config, init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, x in made.named_parameters():
            if "modules_to_save" in name:
                x += 0.1 * torch.randn(x.shape)
    made.save_pretrained(tmp_path)
    source = find(str(tmp_path), base=str(folder))
    model, params = source.read()
    expected = their_logits(made)
    np.testing.assert_allclose(our_logits(model, params), expected, rtol=1e-5, atol=3e-5)
    assert model.tie_word_embeddings == tied
    if variant == "llama_scaled":  # And as written here.
        source.export_adapter(str(tmp_path / "again"))
        base = there(folder)
        base.resize_token_embeddings(size)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "again")
        np.testing.assert_array_equal(their_logits(loaded), expected)
    if variant == "gpt2":  # Over one base with others, it would be another network.
        with pytest.raises(ValueError, match=r"a: .* tables of tokens .* a model of its own"):
            read_adapters(find(str(folder)), *folders(variant)[:2], {"a": str(tmp_path)})


@pytest.mark.parametrize(
    ("variant", "sizes", "saved", "message"),
    [
        ("t5_1_1", {"lm_head": 63}, None, "63 tokens, its base has 61, and .* to shared.weight"),
        (
            "t5_1_1",
            {"lm_head": 63, "shared": 62},
            None,
            r"weight \(62\), lm_head.weight \(63",
        ),
        (
            "t5_1_1",
            {"shared": 61},
            ["shared"],
            "one table in its base with encoder.embed",
        ),
        (
            "t5_tied",
            {"shared": 61},
            ["shared"],
            "one table in its base with encoder.embed",
        ),
        ("t5_1_1", {"lm_head": 0}, None, "is not whole: lm_head.weight is .*without gathering"),
    ],
)
def test_tables_of_tokens_of_which_a_part_is_missing(
    folders, tmp_path, variant, sizes, saved, message
):
    model, _, folder = folders(variant)
    file = save_ones(tmp_path, model, folder)
    whole = {f"base_model.model.{n}.weight": np.ones((k, 12), np.float32) for n, k in sizes.items()}
    safetensors.numpy.save_file(safetensors.numpy.load_file(file) | whole, file)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": saved}))
    with pytest.raises(ValueError, match=message):
        find(str(tmp_path))


def test_what_one_format_has_no_place_for(folders, tmp_path):
    model, params, folder = folders("t5_1_1")
    config = LoraConfig(rank=2, targets=("wo",), train=("*/mlp/wo/kernel",))
    start = trees.flatten(jax.device_get(lora.init(config, model, params, jax.random.key(1))))
    leaves = {p: x for p, x in start.items() if "lora" in p or p.endswith("mlp/wo/kernel")}
    with pytest.raises(ValueError, match=r"wo has an adapter, and is also trained as a whole"):
        ours.save(tmp_path / "adapter", model, leaves, str(folder))
    assert not (tmp_path / "adapter").exists()


def save_ones(place, model, folder):
    """Writes an adapter of a T5's wo; returns the file of its tensors."""
    path, shapes = "decoder/layers/mlp/wo", {"lora_a": (20, 2), "lora_b": (2, 12), "lora_scale": ()}
    leaves = {f"{path}/{name}": np.ones((2, *shape)) for name, shape in shapes.items()}
    ours.save(place, model, leaves, str(folder))
    return place / "adapter_model.safetensors"


def test_soft_prompts_both_ways(folders, tmp_path):
    model, params, folder = folders("t5_1_1")
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    made = peft.get_peft_model(there(folder), config).eval()
    made.save_pretrained(tmp_path / "theirs")
    leaves = ours.read(tmp_path / "theirs", model)
    assert leaves[prompt.PATH].shape == (3, model.d_model)
    whole = adapted(params, leaves)
    found = our_logits(model, whole)
    np.testing.assert_allclose(found, their_logits(made), atol=3e-5)
    assert np.abs(found - our_logits(model, params)).max() > 1e-3
    ours.save(tmp_path / "ours", model, leaves, str(folder))
    loaded = peft.PeftModel.from_pretrained(there(folder), tmp_path / "ours")
    np.testing.assert_allclose(found, their_logits(loaded), atol=3e-5)
    # With a cache, as answers are written.
    inputs = {"encoder_input_tokens": jnp.array(IDS)}
    first, _ = api.prefill(model, api.arrange_for_decoding(model, whole), inputs)
    batch = inputs | {"decoder_input_tokens": jnp.zeros((2, 1), int)}
    np.testing.assert_allclose(first, api.logits(model, whole, batch)[:, 0], atol=1e-4)


def test_what_a_user_types_is_answered_as_by_peft(tmp_path):
    model = dataclasses.replace(VARIANTS["t5_1_1"], vocab_size=384)
    params = jax.jit(lambda: api.init_params(model, jax.random.key(3)))()
    # Ids that are no bytes are never larger than the first, which is drawn in their place.
    kernel_DV = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = kernel_DV.at[:, 259:].set(kernel_DV[:, :1])
    io.save_params(tmp_path / "base", model, params, tokenizer=ByteTokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    prompts = ["Translate: twelve", "Où est-ce ?"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    answers = []
    for number, config in enumerate(
        (
            peft.LoraConfig(r=4, target_modules=["q", "wo"], lora_alpha=8),
            peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5),
        )
    ):
        torch.manual_seed(number)
        made = peft.get_peft_model(there(tmp_path / "base"), config).eval()
        with torch.no_grad():
            for x in made.parameters():
                if x.requires_grad:
                    x += 0.3 * torch.randn(x.shape)
            made.save_pretrained(tmp_path / f"{number}")
            ids = made.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected = tokenizer.batch_decode(ids, skip_special_tokens=True)
        # Other trainers write the base's config.json beside an adapter.
        shutil.copy(tmp_path / "base" / "config.json", tmp_path / f"{number}")
        assert t5jax.load(str(tmp_path / f"{number}")).generate(prompts, max_tokens=6) == expected
        answers.append(expected)
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', which is not implemented; expected LORA"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication is \[\[0, 2\]\]"),
        ({"init_lora_weights": "pissa"}, "'pissa', which also changes the base's weights"),
        ({"r": 5}, r"has rank 2 in the tensors, but 5 in adapter_config.json"),
        ({"modules_to_save": ["score", "lm_head"]}, "has lm_head, of which there is no tensor"),
        ({"use_dora": True}, r"lora_magnitude_vector is missing, which does not go .* use_dora"),
    ],
)
def test_what_is_not_implemented_is_refused(folders, tmp_path, changes, message):
    model, params, folder = folders("llama_scaled")
    config = LoraConfig(rank=2, targets=("query",))
    start = trees.flatten(jax.device_get(lora.init(config, model, params, jax.random.key(1))))
    leaves = {path: start[path] for path in lora.leaves(config, model)}
    ours.save(tmp_path / "adapter", model, leaves, str(folder))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        ours.read(tmp_path / "adapter", model)


def test_what_the_network_has_not_of_a_model_of_images_too_is_left_out(folders, tmp_path):
    model, params, folder = folders("gemma3")
    config = LoraConfig(rank=2, targets=("query",))
    start = lora.init(config, model, params, jax.random.key(1))
    leaves = {p: x for p, x in jax.device_get(trees.flatten(start)).items() if "lora" in p}
    ours.save(tmp_path, model, leaves, str(folder))
    path = tmp_path / "adapter_model.safetensors"
    tensors = {  # As PEFT names them in a Gemma3ForConditionalGeneration.
        name.replace("model.model.", "model.model.language_model."): x
        for name, x in safetensors.numpy.load_file(path).items()
    }
    tower = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    tensors[f"{tower}.lora_A.weight"] = np.ones((2, 4), np.float32)
    safetensors.numpy.save_file(tensors, path)
    read = ours.read(tmp_path, model)
    assert set(read) == set(leaves)
    for name, x in leaves.items():
        np.testing.assert_allclose(read[name], x, err_msg=name)


@pytest.mark.parametrize("shape", [(), (0,), (0, 12), (4,)])
def test_an_adapter_that_was_saved_without_gathering_is_refused(folders, tmp_path, shape):
    """As DeepSpeed's ZeRO-3 leaves it, of which peft warns as it writes."""
    model, _, folder = folders("t5_1_1")
    file = save_ones(tmp_path, model, folder)
    tensors = safetensors.numpy.load_file(file)
    tensors[next(name for name in tensors if "lora_B" in name)] = np.zeros(shape, np.float32)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"is not whole: .*lora_B.weight is \["):
        ours.read(tmp_path, model)


def test_an_adapter_of_an_embedding_is_refused(folders, tmp_path):
    model, _, folder = folders("t5_1_1")
    file = save_ones(tmp_path, model, folder)
    name = "base_model.model.shared.lora_embedding_A"
    tensors = safetensors.numpy.load_file(file) | {name: np.ones((2, 61), np.float32)}
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"table of embeddings \(shared.lora_emb.* merge it with"):
        ours.read(tmp_path, model)


def test_an_adapter_of_another_base_is_refused(folders, tmp_path):
    model, params, folder = folders("llama_scaled")
    config = LoraConfig(rank=2, targets=("query",))
    start = trees.flatten(jax.device_get(lora.init(config, model, params, jax.random.key(1))))
    leaves = {path: start[path] for path in lora.leaves(config, model)}
    ours.save(tmp_path / "adapter", model, leaves, str(folder))
    with pytest.raises(ValueError, match=r"of another base.*no place for model.*q_proj.lora_A"):
        ours.read(tmp_path / "adapter", folders("gpt2")[0])
