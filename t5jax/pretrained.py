"""A trained model, wherever it lies: a hub name, a Hugging Face folder, a run, or a checkpoint.

model = t5jax.load("google/flan-t5-small")
model.generate(["A step by step recipe to make bolognese pasta:"], max_tokens=64)
t5jax.load("bert-base-uncased").embed(["One vector a text."])
"""

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from t5jax import batch as features
from t5jax import checkpoint, decoding, sharding
from t5jax.architectures import (
    BertConfig,
    Dtype,
    GPTConfig,
    ModelConfig,
    T5Config,
    T5GemmaConfig,
)
from t5jax.checks import check_at_least, check_choice
from t5jax.config import AxisRules, Config, MeshConfig
from t5jax.hf import hub, t5x_files
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.tokenizers import Tokenizer, load_tokenizer

Pooling = Literal["mean", "first", "max", "pooler"]
"""How one vector is made of a text's many."""

_POOLED_HEADS = ("pooler", "sequence_classification")

# What a run decides for itself, whatever the weights were made with.
_COMPUTE_FIELDS = ("dtype", "param_dtype", "scan_layers", "remat", "dropout_rate")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model was found."""

    path: Path
    """A Hugging Face folder, or one checkpoint of a run."""
    config: Config
    """Of a run: what it was trained with. Of a Hugging Face folder: defaults around its model."""

    @property
    def is_checkpoint(self) -> bool:
        return checkpoint.is_checkpoint(self.path)

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    def tokenizer(self) -> Tokenizer:
        run_dir = self.path.parent.parent / checkpoint.TOKENIZER_DIR
        return load_tokenizer(run_dir if self.is_checkpoint else self.path)

    def read(
        self,
        dtype: Dtype | None = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: AxisRules = AxisRules(),
        *,
        encoder_only: bool = False,
    ) -> tuple[ModelConfig, api.Params]:
        """Reads the description and the parameters, as training has them.

        Args:
          dtype: as in `load`.
          mesh, rules: where the parameters go; by default they are copied to all devices.
          encoder_only: of a T5 model, read the encoder and nothing else.
        Raises:
          ValueError: for encoder_only where there is no decoder, or no encoder, to tell apart.
        """
        model = self.model
        if encoder_only:
            if not isinstance(model, T5Config) or model.kind == "encoder":
                raise ValueError(
                    f"{self.path} holds {model.family}, a model of kind {model.kind}; the encoder "
                    "alone is taken from a T5 model that has a decoder; leave --encoder-only out"
                )
            model = model.encoder_alone()
        model = dataclasses.replace(model, param_dtype=dtype or "float32")
        if dtype:
            model = dataclasses.replace(model, dtype=dtype)
        mesh = mesh or sharding.make_mesh()
        shardings = sharding.param_shardings(
            api.param_axes(model), api.param_shapes(model), mesh, rules
        )
        return model, self.params(model, shardings)

    def params(
        self, model: ModelConfig, shardings, new: Mapping[str, jax.Array] | None = None
    ) -> api.Params:
        """Reads the parameters in `model.param_dtype`, leaf by leaf into their places.

        Args:
          model: the source's network, or one that shares parameters with it: as `adopt` returns it.
          shardings: of all parameters.
          new: those that the source does not have (`missing`), path to value.
        """
        shapes, new = api.param_shapes(model), new or {}
        if _network(model) == _network(self.model):
            if self.is_checkpoint:
                return checkpoint.load_params(self.path, shapes, shardings)
            return hf_io.load_params(self.path, model, shardings)
        names = [name for name in _flatten(shapes) if name not in new]
        if self.is_checkpoint:
            shared = (
                flax.traverse_util.unflatten_dict({n: _flatten(tree)[n] for n in names}, sep="/")
                for tree in (shapes, shardings)
            )
            read = _flatten(checkpoint.load_params(self.path, *shared))
        else:
            read = hf_io.load_shared_params(self.path, self.model, model, names, shardings)
        return flax.traverse_util.unflatten_dict({**read, **new}, sep="/")

    def missing(self, model: ModelConfig) -> list[str]:
        """Returns the paths of a network's parameters that the source does not have: a new head's.

        Args:
          model: as `adopt` returns it.
        """
        missing = api.new_params(model, self.model)
        if missing and not self.is_checkpoint:
            spare = hf_io.spare_params(self.path, self.model, model)
            missing = [name for name in missing if name not in spare]
        return missing


def _network(model: ModelConfig) -> ModelConfig:
    """Returns a description without what leaves the parameters' names and values as they are."""
    return dataclasses.replace(model, **{f: getattr(type(model)(), f) for f in _COMPUTE_FIELDS})


def _flatten(tree) -> dict:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def find(name_or_path: str) -> Source:
    """Finds a model without reading its weights. Of a run, the best checkpoint is taken.

    Raises:
      ValueError: if there is none under this name, or it is of a family that we do not know.
    """
    path = Path(name_or_path).expanduser()
    if checkpoint.is_run(path):
        path = checkpoint.best_checkpoint(path)
    if checkpoint.is_checkpoint(path):
        return Source(path, checkpoint.read_config(path))
    if path.is_dir() and t5x_files.is_checkpoint(path):
        raise ValueError(
            f"{path} is a T5X checkpoint; make a run of it with `t5jax import {path} OUTPUT "
            "--vocabulary FILE`, and give OUTPUT here"
        )
    path = hub.resolve(name_or_path)
    model = _tokenizers_eos_first(hf_io.read_config(path, load_tokenizer), path)
    return Source(path, Config(model=model))


def _tokenizers_eos_first(model: ModelConfig, folder: Path) -> ModelConfig:
    """Returns the same with the tokenizer's eos as its eos_token_id.

    config.json may name several ids that end a text (Llama 3's chat models), in any order; the
    tokenizer's ends the texts that a run trains on.
    """
    if not isinstance(model, (GPTConfig, T5GemmaConfig)) or not model.more_eos_token_ids:
        return model
    try:
        eos = load_tokenizer(folder).eos_id
    except ValueError:  # Weights alone; a run names its vocabulary.
        return model
    if eos not in model.end_token_ids:
        return model
    rest = tuple(i for i in model.end_token_ids if i != eos)
    return dataclasses.replace(model, eos_token_id=eos, more_eos_token_ids=rest)


def adopt(model: ModelConfig, source: Source, name: str) -> ModelConfig:
    """Returns the source's architecture with the run's own dtype, dropout, scan and remat.

    BERT has the head that the run asks for, whose parameters may be new (`Source.missing`).

    Raises:
      ValueError: if the run asks for another architecture; fields left at their defaults do not.
    """
    theirs, default = source.model, type(model)()
    if isinstance(theirs, BertConfig) and isinstance(model, BertConfig):
        theirs = theirs.with_head_of(model)
    if type(theirs) is not type(model):
        # A config that says nothing of the architecture takes whatever it starts from.
        default = dataclasses.replace(default, **{f: getattr(model, f) for f in _COMPUTE_FIELDS})
        if model != default:
            raise ValueError(
                f"model is a {type(model).__name__}, but {name} holds {theirs.family}, a "
                f"{type(theirs).__name__}; leave `model` out of the config, or start from another"
            )
        return dataclasses.replace(theirs, **{f: getattr(model, f) for f in _COMPUTE_FIELDS})
    wrong = [
        f"model.{field.name} is {ours!r}, in {name} it is {getattr(theirs, field.name)!r}"
        for field in dataclasses.fields(model)
        if field.name not in _COMPUTE_FIELDS
        and (ours := getattr(model, field.name)) != getattr(default, field.name)
        and ours != getattr(theirs, field.name)
    ]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; leave it out, or start from another model")
    return dataclasses.replace(theirs, **{f: getattr(model, f) for f in _COMPUTE_FIELDS})


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model on the devices of a mesh, with its tokenizer."""

    model: ModelConfig
    params: api.Params
    """Those of a model with a decoder as `api.arrange_for_decoding` returns them."""
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    rules: AxisRules = AxisRules()
    prefix_lm: bool = False
    """A decoder's prompt sees itself in both directions, as data.prefix_lm has it."""

    @property
    def kind(self) -> features.Kind:
        return "prefix_lm" if self.prefix_lm else self.model.kind

    def generate(
        self, prompts: Sequence[str], *, max_tokens: int = 64, batch_size: int = 32
    ) -> list[str]:
        """Returns the greedy answer to each prompt.

        Args:
          prompts: texts. An encoder-decoder reads an end of sequence behind each; a decoder reads
            its start token in front, and goes on with the text.
          max_tokens: of each answer, at most.
          batch_size: prompts decoded together. Rows and lengths are padded to powers of two, so
            that few shapes are compiled.
        Raises:
          ValueError: for a model that writes no text, or that has no positions for so many tokens.
        """
        if self.model.kind == "encoder":
            raise ValueError(
                f"{self.model.family} is an encoder and writes no text; `t5jax embed` gives its "
                "embeddings, `t5jax eval` what it predicts"
            )
        answers = []
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            ids = [
                features.as_prompt(
                    self.model, [*self.tokenizer.encode(text), self.tokenizer.eos_id]
                )
                for text in chunk
            ]
            rows, length = self._padded(ids)
            batch = features.prompt_batch(ids, self.kind, rows, length)
            with sharding.use_mesh(self.mesh, self.rules):
                batch = sharding.shard_batch(batch, self.mesh, self.rules)
                tokens_BT = decoding.greedy(self.model, self.params, batch, max_tokens)
            tokens_BT = np.asarray(jax.device_get(tokens_BT))[: len(chunk)]
            written = (features.as_answer(self.model, row.tolist()) for row in tokens_BT)
            answers += [self.tokenizer.decode(tokens) for tokens in written]
        return answers

    def embed(
        self,
        texts: Sequence[str],
        *,
        pooling: Pooling = "mean",
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> np.ndarray:
        """Returns a vector for each text, from the encoder's last layer: float32 [N, D].

        BERT reads [CLS], the text and [SEP], T5 the text and eos, as in training.

        Args:
          texts: of a model with an encoder.
          pooling: "mean" or "max" over a text's tokens, the special ones among them; the "first"
            token's vector; or "pooler", BERT's layer over the first, where its head has one.
          max_length: tokens of a text, at most: what is longer loses its end, but for the token
            that ends it. None: nothing is cut.
          batch_size: texts encoded together. Rows and lengths are padded to powers of two.
        Raises:
          ValueError: for a decoder, a model without what the pooling needs, or a text that it has
            no positions for.
        """
        model = self.model
        if model.kind == "decoder":
            raise ValueError(
                f"{model.family} is a decoder alone and has no encoder; embed with a T5 or BERT "
                "model"
            )
        check_choice(pooling, typing.get_args(Pooling), "pooling")
        if pooling == "pooler" and getattr(model, "head", "") not in _POOLED_HEADS:
            raise ValueError(
                f"pooling is pooler, but this {model.family} has none (BERT has it where its head "
                f"is {' or '.join(_POOLED_HEADS)}); use mean, first or max"
            )
        if max_length is not None:
            check_at_least(max_length, 3, "max_length")
        ids = [self._encode(text, max_length) for text in texts]
        longest = model.max_positions if isinstance(model, BertConfig) else None
        for number, row in enumerate(ids):
            if longest is not None and len(row) > longest:
                raise ValueError(
                    f"text {number} has {len(row)} tokens, but this {model.family} has {longest} "
                    f"positions; cut texts with max_length={longest} (--max-length {longest})"
                )
        vectors = np.empty((len(ids), model.d_model), np.float32)
        for start in range(0, len(ids), batch_size):
            chunk = ids[start : start + batch_size]
            rows, length = self._padded(chunk)
            length = min(length, longest or length)
            tokens = features.pad_ids(chunk, rows, length, model.pad_token_id)
            batch = {features.ENCODER_INPUT_TOKENS: tokens}
            with sharding.use_mesh(self.mesh, self.rules):
                batch = sharding.shard_batch(batch, self.mesh, self.rules)
                x_BD = _embed(model, self.params, batch, pooling)
            vectors[start : start + len(chunk)] = jax.device_get(x_BD)[: len(chunk)]
        return vectors

    def _encode(self, text: str, max_length: int | None) -> list[int]:
        """Returns what an encoder reads of a text."""
        tokenizer = self.tokenizer
        ids = features.as_prompt(self.model, [*tokenizer.encode(text), tokenizer.eos_id])
        if max_length is not None and len(ids) > max_length:
            ids = [*ids[: max_length - 1], tokenizer.eos_id]
        return ids

    def _padded(self, ids: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Returns rows and length of a batch of these, so that few shapes are compiled."""
        parts = sharding.batch_parts(self.mesh, self.rules)
        rows = -(-_power_of_two(len(ids)) // parts) * parts
        return rows, _power_of_two(max(map(len, ids)), least=16)


@functools.partial(jax.jit, static_argnames=("model", "pooling"))
def _embed(model: ModelConfig, params: api.Params, batch: dict, pooling: Pooling) -> jax.Array:
    """Returns float32 [B, D]; rows of padding alone have some value."""
    if pooling == "pooler":
        x_BD = api.hidden(model, params, batch)[:, 0]
    else:
        x_BSD = api.encode(model, params, batch).astype(jnp.float32)
        is_token_BS1 = (batch[features.ENCODER_INPUT_TOKENS] != model.pad_token_id)[..., None]
        if pooling == "first":
            x_BD = x_BSD[:, 0]
        elif pooling == "max":
            x_BD = jnp.max(jnp.where(is_token_BS1, x_BSD, -jnp.inf), axis=1)
        else:
            x_BD = jnp.mean(x_BSD, axis=1, where=is_token_BS1)
    # Whole on every device, so that every host can read it.
    return sharding.constrain(x_BD.astype(jnp.float32), None, None)


def load(
    name_or_path: str,
    *,
    dtype: Dtype | None = None,
    mesh: MeshConfig = MeshConfig(),
    rules: AxisRules = AxisRules(),
) -> Pretrained:
    """Loads a model and its tokenizer.

    Args:
      name_or_path: a hub name, a Hugging Face folder, a run's folder, or one of its checkpoints.
      dtype: to compute in and to hold parameters in, "float32" or "bfloat16". None: parameters in
        float32, computing as the model was trained.
      mesh: devices; fsdp and model split the parameters over them, data copies them.
    Raises:
      ValueError: if it cannot be found or read.
    """
    source, mesh = find(name_or_path), sharding.make_mesh(mesh)
    model, params = source.read(dtype, mesh, rules)
    # Unrolled layers decode faster: a scan would copy each layer's weights at every token.
    model = dataclasses.replace(model, scan_layers=False)
    if model.kind != "encoder":
        with sharding.use_mesh(mesh, rules):
            params = jax.jit(lambda params: api.arrange_for_decoding(model, params))(params)
    prefix_lm = source.config.data.prefix_lm
    return Pretrained(model, params, source.tokenizer(), mesh, rules, prefix_lm)


def export_model(
    model: str,
    output: str,
    *,
    dtype: str,
    max_shard_bytes: int,
    overwrite: bool,
    encoder_only: bool = False,
) -> None:
    """Writes a model, wherever it lies, or a T5's encoder alone, as a Hugging Face folder."""
    source = find(model)
    description, params = source.read(encoder_only=encoder_only)
    hf_io.save_params(
        output,
        description,
        params,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=source.tokenizer(),
        overwrite=overwrite,
    )


def import_model(model: str, output: str, *, mesh: MeshConfig = MeshConfig()) -> None:
    """Writes a model, wherever it lies, as a run that holds its parameters as step 0.

    Args:
      mesh: devices that the parameters are split over on their way.
    Raises:
      ValueError: if the output is a run already, or cannot be written.
    """
    if checkpoint.is_run(Path(output)):
        raise ValueError(f"{output} holds a run already; choose another folder")
    source = find(model)
    run_dir = checkpoint.create_run_dir(output)
    description, params = source.read(mesh=sharding.make_mesh(mesh))
    config = dataclasses.replace(source.config, model=description, run_dir=output)
    source.tokenizer().save(run_dir / checkpoint.TOKENIZER_DIR)
    checkpoint.write_config(run_dir, config)
    with checkpoint.Checkpoints(run_dir) as checkpoints:
        checkpoints.save_params(params, config)


def _power_of_two(n: int, least: int = 1) -> int:
    """Returns the smallest power of two that is at least n."""
    return max(least, 1 << (n - 1).bit_length())
