"""Everything of t5jax that reads what someone else has made, with sound inputs to begin from."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import yaml
from flax import serialization

from conformance.families import FAMILIES as CASES
from faults.hostile import Reader
from faults.mutating import DECOY
from t5jax import checksums, config
from t5jax.architectures import FAMILIES
from t5jax.config import Config
from t5jax.data.cache.reader import CachedTask
from t5jax.data.prompts.chat import ChatTemplate
from t5jax.data.prompts.jinja import JinjaTemplate
from t5jax.data.prompts.promptsource import promptsource
from t5jax.hf import files as hf_files
from t5jax.hf import io as hf_io
from t5jax.quantize import files as quantized_files
from t5jax.serving import schemas
from t5jax.t5x import files as t5x_files
from t5jax.tokenizers import ByteTokenizer, load_tokenizer

ROW = {"word": "ab", "label": 1, "choices": ["x", "y"], "n": 3}


def readers(folder: Path) -> dict[str, Reader]:
    """Returns the readers by name.

    Args:
      folder: empty, for the files; best in memory.
    """
    (folder.parent / DECOY).write_text("secret")
    return {
        "config.json": _config_json(folder / "model"),
        "tokenizer.json": _tokenizer(folder / "tokenizer", "tokenizer.json"),
        "tokenizer_config.json": _tokenizer(folder / "tokenizer_2", "tokenizer_config.json"),
        "spiece.model": _sentence_piece(folder / "piece"),
        "safetensors": _safetensors(folder / "tensors"),
        "msgpack": _msgpack(folder / "msgpack"),
        "cache": _cache(folder / "cache"),
        "lengths.npy": _lengths(folder / "cache_2"),
        "template": _template(),
        "chat template": _chat(),
        "templates.yaml": _yaml(folder / "yaml"),
        "config of a run": _run_config(),
        "compressed model": _compressed(folder / "compressed"),
        "checksums": _checksums(folder / "checksums"),
        "body of a request": _body(),
    }


def _file(path: Path, read) -> object:
    path.parent.mkdir(parents=True, exist_ok=True)

    def write_and_read(content: bytes) -> object:
        path.write_bytes(content)
        return read()

    return write_and_read


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _config_json(folder: Path) -> Reader:
    seeds = []
    for name, case in CASES.items():
        model = case.variants[case.fast[0]]
        description = FAMILIES[name].load_table().write_config(model)
        seeds.append(_json(description))
    read = _file(folder / "config.json", lambda: hf_io.read_config(folder))
    return Reader(seeds, read, is_json=True)


def _tokenizer(folder: Path, file: str) -> Reader:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4, "ab": 5}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    files = {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": _json({"tokenizer_class": "PreTrainedTokenizerFast", **special}),
    }
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)

    def read() -> None:
        load_tokenizer(folder).encode("ab a")

    return Reader([files[file]], _file(folder / file, read), is_json=True)


def _sentence_piece(folder: Path) -> Reader:
    from sentencepiece import sentencepiece_model_pb2 as pb2

    model = pb2.ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    for piece in [*kinds, "▁", "a", "b", "▁a", "ab"]:
        model.pieces.add(piece=piece, score=-1.0, type=kinds.get(piece, 1))
    model.trainer_spec.model_type = pb2.TrainerSpec.UNIGRAM
    file = folder / "spiece.model"
    seed = model.SerializeToString()
    return Reader([seed], _file(file, lambda: load_tokenizer(file).encode("ab a")))


def _safetensors(folder: Path) -> Reader:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.weight": np.ones(2, np.int32)}

    def read() -> None:
        with hf_files.open_tensors(folder) as found:
            for tensor in found.values():
                tensor[(slice(None),) * len(tensor.shape)]

    path = folder / "model.safetensors"
    return Reader([safetensors.numpy.save(tensors)], _file(path, read))


def _msgpack(folder: Path) -> Reader:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {"target": {"a": {"kernel": array}}, "state": {"step": np.int32(3)}}
    seed = serialization.msgpack_serialize({"version": 3, "optimizer": tree})
    path = folder / "checkpoint"
    return Reader([seed], _file(path, lambda: t5x_files.open_tensors(path)))


def _write_cache(folder: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True)
    writer = ArrayRecordWriter(str(folder / "shard-0.array_record"), "group_size:1")
    for row in ([3, 4, 1], [5, 1]):
        writer.write(np.array(row, np.uint16).tobytes())
    writer.close()
    np.save(folder / "lengths.npy", np.array([[2, 1], [1, 1]], np.int32))
    names = ("shard-0.array_record", "lengths.npy")
    info = {
        "task": "t",
        "split": "train",
        "num_examples": 2,
        "num_tokens": 5,
        "dropped": {},
        "features": ["inputs", "targets"],
        "eos_ids": {"inputs": 1, "targets": 1},
        "dtype": "<u2",
        "content": "0",
        "shards": {"shard-0.array_record": 2},
        "files": {name: (folder / name).stat().st_size for name in names},
        "fingerprint": {},
        "source_files": [],
    }
    (folder / "cache.json").write_text(json.dumps(info))


def _read_cache(folder: Path) -> None:
    cache = CachedTask(folder)
    cache.read(np.arange(len(cache)))


def _cache(folder: Path) -> Reader:
    _write_cache(folder)
    path = folder / "cache.json"
    seed = path.read_bytes()
    return Reader([seed], _file(path, lambda: _read_cache(folder)), is_json=True)


def _lengths(folder: Path) -> Reader:
    _write_cache(folder)
    path = folder / "lengths.npy"
    return Reader([path.read_bytes()], _file(path, lambda: _read_cache(folder)))


def _template() -> Reader:
    seeds = [
        b"{{ word }} is {{ choices[label] }} ||| {{ n + 1 }}",
        b"{% for c in choices %}{{ loop.index }}. {{ c | upper }}\n{% endfor %} ||| {{ word[0] }}",
        b"{% set x = n * 2 %}{% if x > 3 %}{{ 'a' * x }}{% endif %} ||| {{ [1, 2] | join(',') }}",
        b"{{ ''.__class__.__mro__ }} ||| {{ range(10) | list }}",
        b"{{ '%s' % word }} {{ 'x{}'.format(n) }} ||| {{ cycler('a', 'b').next() }}",
    ]

    def read(content: bytes) -> None:
        JinjaTemplate(content.decode(errors="replace"), "t").render(ROW)

    return Reader(seeds[:3] + seeds[4:], read)


def _chat() -> Reader:
    seeds = [
        b"{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}",
        b"{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content | trim }}"
        b"{% else %}A: {{ m.content }}{% endif %}{% endfor %}"
        b"{% if add_generation_prompt %}A:{% endif %}",
    ]
    row = {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho"},
        ]
    }
    tokenizer = ByteTokenizer()

    def read(content: bytes) -> None:
        text = content.decode(errors="replace")
        ChatTemplate(text).bind(tokenizer).render(row)

    return Reader(seeds, read)


def _yaml(folder: Path) -> Reader:
    template = {"name": "one", "jinja": "{{ word }} ||| {{ n }}", "answer_choices": "a ||| b"}
    plain = yaml.safe_dump({"dataset": "d", "templates": {"k": template}}).encode()
    tagged = (
        b"dataset: d\ntemplates:\n  k: !Template\n    name: one\n    jinja: '{{ word }} ||| b'\n"
    )
    path = folder / "templates.yaml"
    return Reader([plain, tagged], _file(path, lambda: promptsource(path)))


def _run_config() -> Reader:
    return Reader(
        [config.to_json(Config()).encode()],
        lambda content: config.from_json(content.decode()),
        is_json=True,
    )


def _compressed(folder: Path) -> Reader:
    folder.mkdir(parents=True)
    safetensors.numpy.save_file({"a": np.ones((2, 3), np.float32)}, folder / "arrays.safetensors")
    (folder / quantized_files.CONFIG_FILE).write_text(config.to_json(Config()))
    entry = {"file": "arrays.safetensors", "dtype": "float32", "shape": [2, 3], "crc32": 0}
    manifest = {
        "format": quantized_files.FORMAT,
        "version": quantized_files.VERSION,
        "scheme": {"weights": "int8", "keep": []},
        "method": "rtn",
        "calibration": [],
        "matrices": {},
        "arrays": {"a": entry},
    }
    path = folder / quantized_files.MANIFEST

    def read() -> None:
        quantized_files.read_scheme(folder)

    return Reader([_json(manifest)], _file(path, read), is_json=True)


def _checksums(folder: Path) -> Reader:
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"a")
    checksums.write(folder)
    path = folder / checksums.FILE
    seed = path.read_bytes()
    return Reader([seed], _file(path, lambda: checksums.faults(folder)), is_json=True)


def _body() -> Reader:
    options = {"model": "m", "max_tokens": 4, "temperature": 0.5, "stop": ["x"], "n": 1, "seed": 3}
    logits = {"logit_bias": {"5": 1.5}, "logprobs": 2, "stream": True}
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": "m", "top_p": 0.9}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    bodies = {
        schemas.CompletionBody: {"prompt": ["a", "b"], **options, **logits},
        schemas.ChatBody: {**chat, "response_format": schema},
        schemas.EmbeddingBody: {"input": ["a"], "model": "m"},
        schemas.TokenizeBody: {"prompt": "a"},
        schemas.DetokenizeBody: {"tokens": [1, 2]},
    }

    def read(content: bytes) -> None:
        first = None
        for kind in bodies:
            try:
                kind.model_validate_json(content)
                return
            except ValueError as error:
                first = error
        raise first

    return Reader([_json(body) for body in bodies.values()], read, is_json=True)
