"""A model: a run's checkpoint, a Hugging Face folder, or a compressed model; and a run that begins
with one."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from t5jax import checkpoint, sharding, storage, trees
from t5jax.architectures import Architecture, Dtype
from t5jax.config import AxisRules, Config
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.quantize import files as quantized_files
from t5jax.tokenizers import MissingTokenizer, Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Source:
    """The location of a model."""

    path: Path
    """A Hugging Face folder, one checkpoint of a run, or the folder of a compressed model."""
    config: Config
    """The config of the run; for a Hugging Face folder, its model with defaults."""
    loaded_tokenizer: Tokenizer | None = dataclasses.field(default=None, compare=False, repr=False)
    """The tokenizer, if it has been loaded."""
    origin: Path | None = None
    """In a bucket: the folder that `path` is a copy of."""

    @property
    def place(self) -> Path:
        """Where the model is for all machines."""
        return self.origin or self.path

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders whose files decide what it answers."""
        own = self.path.parent.parent / checkpoint.TOKENIZER_DIR  # Of a run, wherever it is.
        return (self.place, own) if self.is_checkpoint and own.is_dir() else (self.place,)

    @property
    def is_checkpoint(self) -> bool:
        return checkpoint.is_checkpoint(self.path)

    @property
    def is_quantized(self) -> bool:
        """Whether it is a model that `t5jax compress` wrote."""
        return quantized_files.is_quantized(self.path)

    @property
    def model(self) -> Architecture:
        return self.config.model

    def warn_if_unrounded(self) -> None:
        """Warns if the loss of the run saw rounded matrices, since these are the floats."""
        weights = self.config.quantize.weights
        if weights is not None and self.is_checkpoint:
            warnings.warn(
                f"{self.path} was trained to be rounded to {weights}, and is read in floats here; "
                f"`t5jax compress {self.path} FOLDER --weights {weights}` makes the rounded model",
                stacklevel=3,
            )

    def warn_of_prefixes(self, output: str) -> None:
        """Warns if the prompts of the run are read in a way that another format cannot express."""
        if self.config.data.prefix_lm:
            warnings.warn(
                f"{self.path} was trained with data.prefix_lm: the tokens of its prompts see each "
                f"other both ways, which {output} has no word for; whatever reads that folder, "
                "t5jax too, reads prompts causally, and answers otherwise; use the run itself, or "
                "what `t5jax compress` makes of it",
                stacklevel=3,
            )

    def check_whole(self) -> None:
        """Raises ValueError unless the parameters of the network are the whole model."""

    def tokenizer(self) -> Tokenizer:
        return self.loaded_tokenizer or load_tokenizer(self.tokenizer_folder)

    def own_tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer, None if the folder has weights alone."""
        try:
            return self.tokenizer()
        except MissingTokenizer:
            return None

    def generation(self) -> dict[str, Any]:
        """Returns the generation_config.json that the model was published with, {} for none."""
        return hf_io.read_generation(self.tokenizer_folder)

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer and generation_config.json are, if there are any."""
        run_dir = self.path.parent.parent
        if self.is_quantized:
            return self.path / quantized_files.TOKENIZER_DIR
        if not self.is_checkpoint:
            return self.path
        # A run without a tokenizer has no such folder.
        folder = run_dir / checkpoint.TOKENIZER_DIR
        return storage.local(folder) if folder.is_dir() else folder

    def rules(
        self,
        mesh: jax.sharding.Mesh,
        rules: AxisRules | None = None,
        model: Architecture | None = None,
    ) -> AxisRules:
        """Returns how its arrays are sharded over a mesh; warns of an axis that must stay whole.

        Args:
          mesh: the mesh.
          rules: rules to begin with. None: those of the run.
          model: the network, if it is not the source's own; see `adopt`.
        """
        model, rules = model or self.model, rules or self.config.axes
        if mesh.size == 1:
            return rules
        axes, shapes = api.param_axes(model), api.param_shapes(model)
        return sharding.divisible_rules(axes, shapes, mesh, rules)

    def read(
        self,
        dtype: Dtype | None = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: AxisRules | None = None,
        *,
        encoder_only: bool = False,
        dequantize: bool = False,
    ) -> tuple[Architecture, api.Params]:
        """Reads the description and the parameters, in the form used in training.

        The matrices of a compressed model stay quantized (`t5jax.quantize.leaf`), unless asked for.

        Args:
          dtype: as for `load`.
          mesh: the mesh for the parameters; by default they are replicated on all devices.
          rules: how they are sharded over the mesh, see `rules`. None: as in the run.
          encoder_only: only read the encoder.
          dequantize: return floats in place of quantized matrices.
        Raises:
          ValueError: if encoder_only is set and the model has no separate encoder.
        """
        model = self.model
        if encoder_only:
            encoder = model.encoder_alone()
            if encoder is None:
                raise ValueError(
                    f"{self.path} holds {model.family}, a model of kind {model.kind}, which has no "
                    "encoder that could stand alone; leave --encoder-only out"
                )
            model = encoder
        model = dataclasses.replace(model, param_dtype=dtype or "float32")
        if dtype:
            model = dataclasses.replace(model, dtype=dtype)
        mesh = mesh or sharding.make_mesh()
        axes, shapes = api.param_axes(model), api.param_shapes(model)
        rules = sharding.divisible_rules(axes, shapes, mesh, rules or self.config.axes)
        if self.is_quantized and not dequantize:
            return model, quantized_files.load_params(self.path, shapes, axes, mesh, rules)
        shardings = sharding.param_shardings(axes, shapes, mesh, rules)
        return model, self.params(model, shardings)

    def params(
        self, model: Architecture, shardings: Any, new: Mapping[str, jax.Array] | None = None
    ) -> api.Params:
        """Reads the parameters in `model.param_dtype`, one leaf at a time; none is quantized.

        Args:
          model: the source's network, or one that shares parameters with it, as returned by
            `adopt`.
          shardings: the shardings of all parameters.
          new: the parameters that the source does not have (see `missing`), by path.
        """
        shapes, new = api.param_shapes(model), new or {}
        if self.is_quantized:
            own = {name: x for name, x in trees.flatten(shapes).items() if name not in new}
            floats = quantized_files.load_dequantized(self.path, own, trees.flatten(shardings))
            return trees.unflatten({**floats, **new})
        if model.has_params_of(self.model):
            if self.is_checkpoint:
                return checkpoint.load_params(self.path, shapes, shardings)
            return hf_io.load_params(self.path, model, shardings)
        names = [name for name in trees.flatten(shapes) if name not in new]
        if self.is_checkpoint:
            shared = (
                trees.unflatten({n: trees.flatten(tree)[n] for n in names})
                for tree in (shapes, shardings)
            )
            read = trees.flatten(checkpoint.load_params(self.path, *shared))
        else:
            read = hf_io.load_shared_params(self.path, self.model, model, names, shardings)
        return trees.unflatten({**read, **new})

    def missing(self, model: Architecture) -> list[str]:
        """Returns the paths of a network's parameters that the source lacks, such as a new head's.

        Args:
          model: as returned by `adopt`.
        """
        missing = api.new_params(model, self.model)
        if missing and not self.is_checkpoint and not self.is_quantized:
            spare = hf_io.spare_params(self.path, self.model, model)
            missing = [name for name in missing if name not in spare]
        return missing


def adopt(model: Architecture, source: Source, name: str) -> Architecture:
    """Returns the source's architecture with the run's own dtype, dropout, scan and remat.

    If a network can have several heads, it gets the run's, whose parameters may be new
    (`Source.missing`).

    Raises:
      ValueError: if the run sets another architecture; fields with their default values do not.
    """
    theirs, default = source.model.with_head_of(model), type(model)()
    if type(theirs) is not type(model):
        # A config that does not set the architecture adopts the source's.
        if model != default.computed_as(model):
            raise ValueError(
                f"model is a {type(model).__name__}, but {name} holds {theirs.family}, a "
                f"{type(theirs).__name__}; leave `model` out of the config, or start from another"
            )
        return theirs.computed_as(model)
    wrong = [
        f"model.{field.name} is {ours!r}, in {name} it is {getattr(theirs, field.name)!r}"
        for field in dataclasses.fields(model)
        if field.name not in model.COMPUTE_FIELDS
        and (ours := getattr(model, field.name)) != getattr(default, field.name)
        and ours != getattr(theirs, field.name)
    ]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; leave it out, or start from another model")
    return theirs.computed_as(model)
