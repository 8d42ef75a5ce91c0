"""Pruned models and trimmed vocabularies, as folders that transformers reads."""

import functools
import io
import json
import re

import numpy as np
import pytest

import t5jax
from command_line import fails, run
from folders import LINES, write_folder, write_model
from t5jax.prune.prune import prune_model
from t5jax.prune.trim import trim_model
from t5jax.prune.vocabulary import renumber_generation
from t5jax.source import find
from tiny import TASK_FILE, contents, one_device, trained_run  # noqa: F401

TEXT = LINES[:2]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT) + "\n")
    return str(path)


def theirs(folder):
    """transformers' tokenizer and model of a folder."""
    import transformers

    model = transformers.AutoModelForSeq2SeqLM
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind not in ("t5", "mt5", "t5gemma"):
        model = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    return transformers.AutoTokenizer.from_pretrained(folder), model.from_pretrained(folder).eval()


def outputs(folder, ids):
    """transformers' logits of one row of ids; BERT's hidden states."""
    import torch

    _, model = theirs(folder)
    ids = torch.tensor([ids])
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more)[0][0].numpy()


def write_mt5(folder, others=300):
    """mT5's form: bytes for what no piece has, sentinels that are pieces, more rows than ids.

    Args:
      others: the number of pieces that none of the texts has; mT5 has about 249,600.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=59 + 256,
        byte_fallback=True,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for i in range(others):
        proto.pieces.add(
            piece=f"▁{chr(0x4E00 + i % 20_000)}{i // 20_000 or ''}", score=-20 - i / 1e5
        )
    for i in reversed(range(10)):
        proto.pieces.add(piece=f"▁<extra_id_{i}>", score=0, type=4)  # User-defined.
    proto.trainer_spec.vocab_size = len(proto.pieces)
    folder.mkdir()
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    write_model(folder, "mt5", vocab_size=len(proto.pieces) + 12, **shape, **ids)
    (folder / "spiece.model").write_bytes(proto.SerializeToString())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": None}
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | tokens))


@pytest.mark.hf
@pytest.mark.parametrize("name", ["t5", "mt5", "pile_t5", "gpt2", "gemma2", "bert"])
def test_a_trimmed_vocabulary_splits_and_computes_as_before(tmp_path, text, name):
    """SentencePiece, Unigram, byte-level BPE, BPE of characters, WordPiece."""
    (write_mt5 if name == "mt5" else functools.partial(write_folder, name=name))(tmp_path / "whole")
    said = trim_model(str(tmp_path / "whole"), str(tmp_path / "less"), text=[text])
    assert " ids, 100.00% of the texts' " in said
    (before, _), (after, model) = theirs(tmp_path / "whole"), theirs(tmp_path / "less")
    assert len(after) < len(before)
    assert model.config.vocab_size >= len(after)
    if name != "bert":  # Of so few words all are in the text.
        assert model.config.vocab_size < find(str(tmp_path / "whole")).model.vocab_size
    for line in [*TEXT, TEXT[0].split(".")[0], " ".join(TEXT)]:
        old, new = before(line)["input_ids"], after(line)["input_ids"]
        assert before.convert_ids_to_tokens(old) == after.convert_ids_to_tokens(new)
        assert after.decode(new) == before.decode(old)
    # Logits of the ids that are left: those of their tokens before.
    logits = outputs(tmp_path / "whole", old), outputs(tmp_path / "less", new)
    if name != "bert":
        tokens = after.convert_ids_to_tokens(range(len(after)))
        logits = logits[0][:, before.convert_tokens_to_ids(tokens)], logits[1][:, : len(after)]
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-5)
    assert old != new or name == "mt5"  # Whose own pieces are in front here.
    if name == "mt5":
        sources = [find(str(tmp_path / folder)) for folder in ("whole", "less")]
        assert sources[1].model.vocab_size == sources[1].tokenizer().vocab_size
        assert len(sources[1].tokenizer().sentinel_ids) == 10
        kept = before.convert_tokens_to_ids(after.convert_ids_to_tokens(range(len(after))))
        whole, less = (t5jax.load(str(source.path)) for source in sources)
        answers = less.generate(TEXT, max_tokens=6)
        assert whole.generate(TEXT, max_tokens=6, allowed_tokens=tuple(kept)) == answers
    for special in ("pad", "eos", "unk", "bos", "cls", "sep", "mask"):
        assert getattr(before, f"{special}_token") == getattr(after, f"{special}_token"), special
    assert (
        find(str(tmp_path / "less")).tokenizer().encode(TEXT[1])
        == after(TEXT[1], add_special_tokens=False)["input_ids"]
    )


def test_sentinels_stay_at_the_end_in_their_order(tmp_path, text):
    write_folder(tmp_path / "whole", "t5")
    trim_model(str(tmp_path / "whole"), str(tmp_path / "less"), text=[text])
    source = find(str(tmp_path / "less"))
    tokenizer = source.tokenizer()
    assert len(tokenizer.sentinel_ids) == 10
    last = tokenizer.vocab_size - 1
    assert tokenizer.sentinel_ids == tuple(range(last, last - 10, -1))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    # A character that no piece has is unknown, as before.
    unknown = f"{TEXT[0]} ç"
    whole = find(str(tmp_path / "whole")).tokenizer()
    assert [i == 2 for i in tokenizer.encode(unknown)] == [i == 2 for i in whole.encode(unknown)]


def test_a_vocabulary_for_a_task(tmp_path, capsys):
    """Prompts and targets of all splits count; the shares of pieces and bytes are shown."""
    write_folder(tmp_path / "whole", "t5")
    status, out, err = run(
        capsys,
        *("trim-vocabulary", tmp_path / "whole", tmp_path / "less", "--tasks", "capitals"),
        *("--task-files", TASK_FILE, "--eval.tasks", "capitals", "--eval.split", "validation"),
        *("--eval.max-tokens", 4),
    )
    assert status == 0, err
    for part in ("on disk: ", "in memory, float32: ", "speed here: ", "capitals exact_match"):
        assert part in out
    tokenizer = find(str(tmp_path / "less")).tokenizer()
    whole = find(str(tmp_path / "whole")).tokenizer()
    assert tokenizer.vocab_size < whole.vocab_size
    assert tokenizer.decode(tokenizer.encode("capitals: abcd")) == whole.decode(
        whole.encode("capitals: abcd")
    )


def test_generation_is_renumbered():
    kept = np.asarray([0, 1, 5, 7])
    generation = {
        "eos_token_id": [1, 7],
        "pad_token_id": 0,
        "suppress_tokens": [3, 5],
        "bad_words_ids": [[5, 7], [5, 6]],
        "max_new_tokens": 5,
    }
    assert renumber_generation(generation, kept) == {
        "eos_token_id": [1, 3],
        "pad_token_id": 0,
        "suppress_tokens": [2],
        "bad_words_ids": [[2, 3]],
        "max_new_tokens": 5,
    }


@pytest.mark.hf
@pytest.mark.parametrize(
    ("name", "pattern", "config"),
    [
        ("t5", "heads", {"num_heads": 2, "d_model": 32, "d_kv": 8}),
        ("t5", "mlp", {"d_ff": 24}),
        ("qwen3", "heads", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
        ("gpt2", "mlp", {"n_inner": 64}),
    ],
)
def test_a_narrower_model_is_the_same_in_transformers(tmp_path, name, pattern, config):
    write_folder(tmp_path / "whole", name)
    prune_model(str(tmp_path / "whole"), str(tmp_path / "less"), pattern=pattern, sparsity=0.5)
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("whole", "less")]
    assert sizes[1] < sizes[0]
    written = json.loads((tmp_path / "less" / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    ids = [5, 9, 12, 3, 20]
    logits = outputs(tmp_path / "less", ids)
    model, params = find(str(tmp_path / "less")).read()
    from t5jax.models import api

    names = ["decoder_input_tokens"] + ["encoder_input_tokens"] * (model.kind != "decoder")
    ours = api.logits(model, params, {n: np.asarray([ids], np.int32) for n in names})[0]
    np.testing.assert_allclose(ours, logits, atol=1e-4)


def test_pruned_weights_are_zeros_in_the_folder(tmp_path):
    folder = tmp_path / "half"
    said = prune_model(str(trained_run()), str(folder), pattern="2:4", keep=["decoder/*"])
    assert "(50.00%)" in said
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, x in tensors.items():
        is_pruned = name.startswith("encoder") and x.ndim == 2 and "bias" not in name
        is_pruned &= "embed" not in name
        if is_pruned:  # Along the inputs, as torch has them.
            assert ((x.reshape(-1, 4) == 0).sum(axis=1) == 2).all(), name
        else:
            assert (x == 0).mean() < 0.1, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "--eval.split", "x"], "--eval.split is x, but without --eval.tasks it"),
        (["prune", "--eval.inputs-length", "9"], "inputs-length is 9, but without --eval.tasks"),
        (["prune", "--eval.tasks", "x"], "--tasks is 'x', which no task file registers"),
        (["prune", "--sparsity", "1.5"], "--sparsity is 1.5; it must be above 0 and below 1"),
        (
            ["prune", "--pattern", "2:4", "--sparsity", "0.3"],
            "but 2:4 removes a half; leave it out",
        ),
        (
            ["prune", "--keep", "encoder/*/wo"],
            "matches none of the matrices .*there are decoder/lay",
        ),
        (["prune", "--pattern", "heads", "--sparsity", "0.1"], "removes none of the 4 heads"),
        (["prune", "--pattern", "mlp", "--scope", "global"], "--scope global has no use with"),
        (["prune", "--pattern", "mlp", "--keep", "x"], "all layers of a model have the same size"),
        (["trim-vocabulary"], "give --tasks NAME, or --text FILE"),
        (["trim-vocabulary", "--text", "x.txt"], "has no pieces to leave out"),
    ],
)
def test_what_cannot_be_is_one_message_and_nothing_written(tmp_path, capsys, words, message):
    command, *options = words
    assert re.search(message, fails(capsys, command, trained_run(), tmp_path / "new", *options))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_taken_stays(tmp_path):
    write_folder(tmp_path / "whole", "t5")
    before = contents(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"whole is not empty"):
        prune_model(str(tmp_path / "whole"), str(tmp_path / "whole"))
    assert contents(tmp_path / "whole") == before
