"""A trained model, wherever it lies: a hub name, a Hugging Face folder, a run, or a checkpoint.

model = t5jax.load("google/flan-t5-small")
model.generate(["A step by step recipe to make bolognese pasta:"], max_tokens=64)
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from t5jax import batch as features
from t5jax import checkpoint, decoding, sharding
from t5jax.architectures import Dtype, ModelConfig
from t5jax.config import AxisRules, Config, MeshConfig
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.tokenizers import Tokenizer, load_tokenizer

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
    ) -> tuple[ModelConfig, api.Params]:
        """Reads the description and the parameters, as training has them.

        Args:
          dtype: as in `load`.
          mesh, rules: where the parameters go; by default they are copied to all devices.
        """
        model = dataclasses.replace(self.model, param_dtype=dtype or "float32")
        if dtype:
            model = dataclasses.replace(model, dtype=dtype)
        mesh = mesh or sharding.make_mesh()
        shardings = sharding.param_shardings(
            api.param_axes(model), api.param_shapes(model), mesh, rules
        )
        return model, self.params(model, shardings)

    def params(self, model: ModelConfig, shardings) -> api.Params:
        """Reads the parameters in `model.param_dtype`, leaf by leaf into their places."""
        if self.is_checkpoint:
            return checkpoint.load_params(self.path, api.param_shapes(model), shardings)
        return hf_io.load_params(self.path, model, shardings)


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
    path = hf_io.resolve(name_or_path)
    return Source(path, Config(model=hf_io.read_config(path)))


def adopt(model: ModelConfig, source: Source, name: str) -> ModelConfig:
    """Returns the source's architecture with the run's own dtype, dropout, scan and remat.

    Raises:
      ValueError: if the run asks for another architecture; fields left at their defaults do not.
    """
    theirs = source.model
    default = type(model)()
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
    """As `api.arrange_for_decoding` returns them."""
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    rules: AxisRules = AxisRules()

    def generate(
        self, prompts: Sequence[str], *, max_tokens: int = 64, batch_size: int = 32
    ) -> list[str]:
        """Returns the greedy answer to each prompt.

        Args:
          prompts: texts; each is encoded with an end of sequence behind it.
          max_tokens: of each answer, at most.
          batch_size: prompts decoded together. Rows and lengths are padded to powers of two, so
            that few shapes are compiled.
        """
        parts = sharding.batch_parts(self.mesh, self.rules)
        answers = []
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            ids = [[*self.tokenizer.encode(text), self.tokenizer.eos_id] for text in chunk]
            rows = -(-_power_of_two(len(ids)) // parts) * parts
            tokens = features.pad_ids(ids, rows, _power_of_two(max(map(len, ids)), least=16))
            with sharding.use_mesh(self.mesh, self.rules):
                batch = {features.ENCODER_INPUT_TOKENS: tokens}
                batch = sharding.shard_batch(batch, self.mesh, self.rules)
                tokens_BT = decoding.greedy(self.model, self.params, batch, max_tokens)
            tokens_BT = np.asarray(jax.device_get(tokens_BT))[: len(chunk)]
            answers += [self.tokenizer.decode(row.tolist()) for row in tokens_BT]
        return answers


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
    with sharding.use_mesh(mesh, rules):
        params = jax.jit(lambda params: api.arrange_for_decoding(model, params))(params)
    return Pretrained(model, params, source.tokenizer(), mesh, rules)


def export_model(
    model: str, output: str, *, dtype: str, max_shard_bytes: int, overwrite: bool
) -> None:
    """Writes a model, wherever it lies, as a Hugging Face folder."""
    source = find(model)
    description, params = source.read()
    hf_io.save_params(
        output,
        description,
        params,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=source.tokenizer(),
        overwrite=overwrite,
    )


def import_model(model: str, output: str) -> None:
    """Writes a model, wherever it lies, as a run that holds its parameters as step 0.

    Raises:
      ValueError: if the output is a run already, or cannot be written.
    """
    if checkpoint.is_run(Path(output)):
        raise ValueError(f"{output} holds a run already; choose another folder")
    source = find(model)
    run_dir = checkpoint.create_run_dir(output)
    description, params = source.read()
    config = dataclasses.replace(source.config, model=description, run_dir=output)
    source.tokenizer().save(run_dir / checkpoint.TOKENIZER_DIR)
    checkpoint.write_config(run_dir, config)
    with checkpoint.Checkpoints(run_dir) as checkpoints:
        checkpoints.save_params(params, config)


def _power_of_two(n: int, least: int = 1) -> int:
    """Returns the smallest power of two that is at least n."""
    return max(least, 1 << (n - 1).bit_length())
