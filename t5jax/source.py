"""Finds and reads models: a Hub name, a Hugging Face folder, a run, or a checkpoint of a run."""

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from t5jax import checkpoint, sharding, storage
from t5jax.adapters import digest, lora, prompt
from t5jax.adapters import params as adapted
from t5jax.architectures import Architecture, Dtype
from t5jax.config import AxisRules, Config, PromptConfig, override
from t5jax.hf import hub, peft
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.quantize import files as quantized_files
from t5jax.t5x import files as t5x_files
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
    def is_checkpoint(self) -> bool:
        return checkpoint.is_checkpoint(self.path)

    @property
    def is_quantized(self) -> bool:
        """Whether it is a model that `t5jax compress` wrote."""
        return quantized_files.is_quantized(self.path)

    @property
    def model(self) -> Architecture:
        return self.config.model

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
            own = {name: x for name, x in _flatten(shapes).items() if name not in new}
            floats = quantized_files.load_dequantized(self.path, own, _flatten(shardings))
            return flax.traverse_util.unflatten_dict({**floats, **new}, sep="/")
        if model.has_params_of(self.model):
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


@dataclasses.dataclass(frozen=True)
class AdaptedSource(Source):
    """A model with an adapter over a base: the parameters that are read have it merged."""

    base: Source | None = None
    """The base."""
    named_base: str = ""
    """What it was asked for by, in place of the name that the adapter has for it."""

    @property
    def has_prompt(self) -> bool:
        """Whether the adapter is a soft prompt, which cannot be merged."""
        if self.is_checkpoint:
            return isinstance(self.config.adapter, PromptConfig)
        return peft.is_prompt(self.path)

    def generation(self) -> dict[str, Any]:
        assert self.base is not None
        return super().generation() if self.is_checkpoint else self.base.generation()

    def adapter(self, model: Architecture) -> dict[str, Any]:
        """Returns the adapter's parameters and those of the base that it replaces, by path.

        Args:
          model: the network; what of the adapter is of other networks is left out.
        """
        own, ours = self.config.model, _flatten(api.param_shapes(model))
        if not self.is_checkpoint:
            read = peft.read(self.path, own)
            return {p: x for p, x in read.items() if _fits(p, ours)}
        config = self.config.adapter
        assert config is not None
        shapes = _flatten(adapted.param_shapes(own, config))
        base = adapted.base_params(own, config)
        wanted = {path: x for path, x in shapes.items() if path not in base and _fits(path, ours)}
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = flax.traverse_util.unflatten_dict(wanted, sep="/")
        places = jax.tree.map(lambda _: place, tree)
        return jax.device_get(_flatten(checkpoint.load_params(self.path, tree, places)))

    def params(
        self, model: Architecture, shardings: Any, new: Mapping[str, jax.Array] | None = None
    ) -> api.Params:
        """Reads the base's parameters and merges the adapter into them."""
        assert self.base is not None
        found = {**(new or {}), **self.adapter(model)}
        lacks = self.base.missing(model)
        params = self.base.params(model, shardings, {path: found[path] for path in lacks})
        flat = _flatten(params)
        if self.is_checkpoint:
            saved = {p: d for p, d in checkpoint.read_base(self.path).items() if p in flat}
            read = digest.digests({path: flat[path] for path in saved})
            digest.check(read, saved, str(self.path), str(self.base.path))
        if self.is_checkpoint and self.config.adapter is not None:
            # It was trained over what the base is rounded to.
            flat = _flatten(adapted.rounded_to_float(model, self.config.adapter, params))
        whole = flax.traverse_util.unflatten_dict({**flat, **found}, sep="/")

        merged = jax.jit(lambda whole: lora.merge(model, whole))(whole)
        # A soft prompt cannot be merged, and stays beside the base's parameters.
        dtypes, places = {p: x.dtype for p, x in flat.items()}, _flatten(shardings)
        mesh = next(iter(places.values())).mesh
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return flax.traverse_util.unflatten_dict(
            {
                path: jax.device_put(
                    x.astype(dtypes.get(path, x.dtype)), places.get(path, replicated)
                )
                for path, x in _flatten(merged).items()
            },
            sep="/",
        )

    def missing(self, model: Architecture) -> list[str]:
        assert self.base is not None
        found = self.adapter(model)
        return [path for path in self.base.missing(model) if path not in found]

    def merge_error(self, dtype: Dtype) -> str:
        """Returns, in a sentence, what rounding merged matrices to a dtype does to them."""
        assert self.base is not None
        _, params = self.base.read(dequantize=True)
        whole = flax.traverse_util.unflatten_dict(
            {**_flatten(params), **self.adapter(self.model)}, sep="/"
        )
        # Not jitted: XLA would leave out the rounding, whose result is made float32 again.
        found = lora.merge_errors(self.model, whole, dtype)
        errors = {path: np.asarray(x) for path, x in found.items()}
        lost, added = sum(errors.values())
        worst = max(errors, key=lambda path: errors[path][0] / max(errors[path][1], 1e-30))
        shares = [np.sqrt(x[0] / max(x[1], 1e-30)) for x in ((lost, added), errors[worst])]
        return (
            f"{dtype} rounds merged matrices by {shares[0]:.1%} of what the adapter adds to them "
            f"(root mean square; most in {worst}, {shares[1]:.1%}); float32 keeps all of it"
        )

    def export_adapter(self, output: str, *, overwrite: bool = False) -> None:
        """Writes the adapter alone, as a folder that peft loads.

        Raises:
          ValueError: if the output cannot be written, or PEFT's format lacks something.
        """
        assert self.base is not None
        name = self.named_base or (
            self.config.init.model if self.is_checkpoint else peft.base_of(self.path)
        )
        base = str(Path(name).expanduser().absolute()) if Path(name).exists() else name
        params = {p: np.asarray(x, np.float32) for p, x in self.adapter(self.model).items()}
        tokenizer = self.own_tokenizer()
        peft.save(output, self.model, params, base, tokenizer=tokenizer, overwrite=overwrite)
        if self.base.is_checkpoint:
            warnings.warn(
                f"{output} names its base {base}, a run, which PEFT cannot load: export that run, "
                "and the adapter again with --base FOLDER --overwrite",
                stacklevel=2,
            )


def _fits(path: str, params: Mapping[str, Any]) -> bool:
    """Returns whether a network with these parameters has a place for one of an adapter."""
    return path in params or lora.kernel_of(path) in params or path == prompt.PATH


def find_base(config: Config) -> Source:
    """Returns the base of an adapter's run: init.model.

    Raises:
      ValueError: if the config names none, or it cannot be found.
    """
    if not config.init.model:
        raise ValueError(
            "adapter is set, but init.model is empty: an adapter is trained over a model; set "
            "init.model, or leave the adapter out"
        )
    return find(config.init.model, config.data.vocabulary)


def _flatten(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def find(name_or_path: str, vocabulary: str = "", *, base: str = "") -> Source:
    """Finds a model without reading its weights; for a run, its best checkpoint.

    Args:
      name_or_path: a Hub name, a Hugging Face folder, a run, or a checkpoint of a run.
      vocabulary: the tokenizer to use instead of the model's own, as for `load_tokenizer`.
      base: of an adapter: where its base is now. Empty: where the adapter says.
    Raises:
      ValueError: if there is no such model, or its family is unknown; if a base is given, and it is
        no adapter.
    """
    source = _find(name_or_path, vocabulary, base)
    if base and not isinstance(source, AdaptedSource):
        raise ValueError(
            f"{source.path} is a whole model, so --base {base} (base) has no effect; leave it out"
        )
    return source


def _find(name_or_path: str, vocabulary: str, base: str) -> Source:
    tokenizer = load_tokenizer(vocabulary) if vocabulary else None
    path = storage.path(name_or_path, "the model")
    if checkpoint.is_run(path):
        path = checkpoint.best_checkpoint(path)
    if checkpoint.is_checkpoint(path):
        checkpoint.check(path)
        config = checkpoint.read_config(path)
        if config.adapter is None:
            return Source(path, config, tokenizer)
        return AdaptedSource(
            path, config, tokenizer, base=_base_of(path, config, base), named_base=base
        )
    origin = path if storage.is_remote(path) else None
    if quantized_files.is_quantized(path):
        path = storage.local(path)
        return Source(path, quantized_files.read_config(path), tokenizer, origin)
    if path.is_dir() and t5x_files.is_checkpoint(path):
        raise ValueError(
            f"{path} is a T5X checkpoint; make a run of it with `t5jax import {path} OUTPUT "
            "--vocabulary FILE`, and give OUTPUT here"
        )
    path = hub.resolve(name_or_path)
    if peft.is_adapter(path):
        return _peft_adapter(path, tokenizer, vocabulary, base)
    if tokenizer is None:
        # If there is none, or it is damaged, `Source.tokenizer` will say so.
        with contextlib.suppress(ValueError):
            tokenizer = load_tokenizer(path)
    return Source(path, Config(model=hf_io.read_config(path, tokenizer)), tokenizer, origin)


def _peft_adapter(
    path: Path, tokenizer: Tokenizer | None, vocabulary: str, given: str
) -> AdaptedSource:
    name = given or peft.base_of(path)
    if not name:
        raise ValueError(
            f"{path} holds an adapter alone, and its adapter_config.json names no base; write it "
            f"there, as base_model_name_or_path{_OR_BASE}"
        )
    try:
        base = find(name, vocabulary)
    except ValueError as error:
        remedy = (
            f"; write where it is into adapter_config.json, as base_model_name_or_path{_OR_BASE}"
        )
        raise ValueError(_without_base(path, name, error) + ("" if given else remedy)) from error
    if tokenizer is None:
        with contextlib.suppress(ValueError):
            tokenizer = load_tokenizer(path)
    config = Config(model=base.model)
    return AdaptedSource(
        path, config, tokenizer or base.own_tokenizer(), base=base, named_base=given
    )


def read_adapters(
    base: Source, model: Architecture, params: api.Params, adapters: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Returns several adapters over one base, as `lora.stack` stacks them.

    Args:
      base: the base.
      model: its network.
      params: its parameters.
      adapters: runs, checkpoints or PEFT's folders by name.
    Raises:
      ValueError: if one is no adapter, is of another base, or replaces parameters of the base.
    """
    flat, found = _flatten(params), []
    for name, given in adapters.items():
        path = storage.path(given, f"adapter {name}")
        if checkpoint.is_run(path):
            path = checkpoint.best_checkpoint(path)
        config = Config(model=base.model)
        if checkpoint.is_checkpoint(path):
            checkpoint.check(path)
            config = checkpoint.read_config(path)
            if config.adapter is None:
                raise ValueError(
                    f"adapter {name}: {given} is a run without an adapter; serve it as a model"
                )
            if rounding := getattr(config.adapter, "base", None):
                raise ValueError(
                    f"adapter {name}: {given} was trained over its base in {rounding} "
                    "(adapter.base), and would answer otherwise over this one; serve it as a model "
                    f"of its own: t5jax serve {given}; or let go of the rounding, with the folder "
                    f"that `t5jax export {given} FOLDER` writes"
                )
            saved = checkpoint.read_base(path)
            read = digest.digests({p: flat[p] for p in saved if p in flat})
            digest.check(read, saved, str(path), str(base.path))
        elif not peft.is_adapter(path := hub.resolve(given)):
            raise ValueError(f"adapter {name}: {given} is a whole model; serve it as a model")
        leaves = AdaptedSource(path, config, base=base).adapter(model)
        if prompt.PATH in leaves:
            raise ValueError(
                f"adapter {name}: {given} is a soft prompt, which cannot share a base; serve it as "
                f"a model of its own: t5jax serve {given}"
            )
        if replaced := [p for p in leaves if p.rpartition("/")[2] not in lora.LEAVES]:
            raise ValueError(
                f"adapter {name}: {given} also replaces {replaced[0]} of its base, which cannot be "
                f"shared; serve it as a model of its own: t5jax serve {given}"
            )
        found.append(leaves)
    return lora.stack(model, found)


# The commands that know the option.
_OR_BASE = ", or give it with --base (eval, export, infer, serve; base in Python)"


def _base_of(path: Path, config: Config, given: str) -> Source:
    if given:
        config = override(config, {"init.model": given})
    try:
        return find_base(config)
    except ValueError as error:
        told = _without_base(path, config.init.model, error)
        remedy = f"; put it back{_OR_BASE}; a merged export (export --merge) needs none"
        raise ValueError(told + ("" if given else remedy)) from error


def _without_base(path: Path, name: str, error: ValueError) -> str:
    return f"{path} holds an adapter alone; its base {name} is not found: {error}"


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
