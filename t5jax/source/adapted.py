"""A model with an adapter over a base."""

import dataclasses
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5jax import checkpoint, trees
from t5jax.adapters import digest, lora, prompt
from t5jax.adapters import params as adapted
from t5jax.architectures import Architecture, Dtype
from t5jax.config import PromptConfig
from t5jax.hf import peft
from t5jax.models import api
from t5jax.source.whole import Source


@dataclasses.dataclass(frozen=True)
class AdaptedSource(Source):
    """A model with an adapter over a base: the parameters that are read have it merged."""

    base: Source | None = None
    """The base."""
    named_base: str = ""
    """What it was asked for by, in place of the name that the adapter has for it."""

    @property
    def places(self) -> tuple[Path, ...]:
        assert self.base is not None
        return (*super().places, *self.base.places)

    def check_whole(self) -> None:
        """Raises ValueError if the adapter is a soft prompt, or the base has one."""
        assert self.base is not None
        self.base.check_whole()
        if (
            isinstance(self.config.adapter, PromptConfig)
            if self.is_checkpoint
            else peft.is_prompt(self.path)
        ):
            raise ValueError(
                f"{self.path} has a soft prompt, which cannot be merged into its network; use it "
                "as it is (eval, infer, serve), export it for PEFT, or take the model that it was "
                f"trained over, {self.base.place}"
            )

    def generation(self) -> dict[str, Any]:
        assert self.base is not None
        return super().generation() if self.is_checkpoint else self.base.generation()

    def adapter(self, model: Architecture) -> dict[str, Any]:
        """Returns the adapter's parameters and those of the base that it replaces, by path.

        Args:
          model: the network; what of the adapter is of other networks is left out, such as a head
            with other labels.
        """
        own = self.config.model
        other_head = api.new_params(model, own)
        ours = {p for p in trees.flatten(api.param_shapes(model)) if p not in other_head}
        if not self.is_checkpoint:
            read = peft.read(self.path, own)
            return {p: x for p, x in read.items() if _fits(p, ours)}
        config = self.config.adapter
        assert config is not None
        shapes = trees.flatten(adapted.param_shapes(own, config))
        base = adapted.base_params(own, config)
        wanted = {path: x for path, x in shapes.items() if path not in base and _fits(path, ours)}
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = trees.unflatten(wanted)
        places = jax.tree.map(lambda _: place, tree)
        return jax.device_get(trees.flatten(checkpoint.load_params(self.path, tree, places)))

    def params(
        self, model: Architecture, shardings: Any, new: Mapping[str, jax.Array] | None = None
    ) -> api.Params:
        """Reads the base's parameters and merges the adapter into them."""
        assert self.base is not None
        found = {**(new or {}), **self.adapter(model)}
        lacks = self.base.missing(model)
        if absent := [path for path in lacks if path not in found]:
            raise ValueError(
                f"{self.path} needs {', '.join(absent)}, which neither it nor its base "
                f"{self.base.path} has; give the base that it was trained over"
            )
        params = self.base.params(model, shardings, {path: found[path] for path in lacks})
        flat = trees.flatten(params)
        self._check_base(flat)
        if self.is_checkpoint and self.config.adapter is not None:
            # It was trained over what the base is rounded to.
            flat = trees.flatten(adapted.rounded_to_float(model, self.config.adapter, params))
        whole = trees.unflatten({**flat, **found})

        merged = jax.jit(lambda whole: lora.merge(model, whole))(whole)
        # A soft prompt cannot be merged, and stays beside the base's parameters.
        dtypes = {p: x.dtype for p, x in trees.flatten(api.param_shapes(model)).items()}
        places = trees.flatten(shardings)
        mesh = next(iter(places.values())).mesh
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return trees.unflatten(
            {
                path: jax.device_put(
                    x.astype(dtypes.get(path, x.dtype)), places.get(path, replicated)
                )
                for path, x in trees.flatten(merged).items()
            }
        )

    def _check_base(self, params: Mapping[str, Any]) -> None:
        """Raises ValueError if parameters of the base are not those that a run was trained over."""
        assert self.base is not None
        if self.is_checkpoint:
            saved = {p: d for p, d in checkpoint.read_base(self.path).items() if p in params}
            read = digest.digests({path: params[path] for path in saved})
            digest.check(read, saved, str(self.path), str(self.base.path))

    def missing(self, model: Architecture) -> list[str]:
        assert self.base is not None
        found = self.adapter(model)
        return [path for path in self.base.missing(model) if path not in found]

    def merge_error(self, dtype: Dtype) -> str:
        """Returns, in a sentence, what rounding merged matrices to a dtype does to them."""
        assert self.base is not None
        _, params = self.base.read(dequantize=True)
        whole = trees.unflatten({**trees.flatten(params), **self.adapter(self.model)})
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
        name, revision = self.named_base, None
        if not name and self.is_checkpoint:
            name = self.config.init.model
        elif not name:
            name, revision = peft.base_of(self.path), peft.revision_of(self.path)
        base = str(Path(name).expanduser().absolute()) if Path(name).exists() else name
        if self.named_base:  # Nothing else compares it.
            self._check_base(trees.flatten(self.base.read(dequantize=True)[1]))
        peft.save(
            output,
            self.model,
            {p: np.asarray(x, np.float32) for p, x in self.adapter(self.model).items()},
            base,
            revision=revision,
            tokenizer=self.own_tokenizer(),
            overwrite=overwrite,
        )
        if what := _not_for_peft(self.base):
            kind, option = what
            warnings.warn(
                f"{output} names its base {base}, {kind}, which PEFT cannot load: export that "
                f"(t5jax export {base} FOLDER{option}), and the adapter again with --base FOLDER "
                "--overwrite",
                stacklevel=2,
            )
        if rounding := self.is_checkpoint and getattr(self.config.adapter, "base", None):
            warnings.warn(
                f"{output} is written without the rounding of its base to {rounding} "
                "(adapter.base), over which it was trained; --merge keeps it",
                stacklevel=2,
            )


def _not_for_peft(base: Source) -> tuple[str, str] | None:
    """Returns what a base is, and an option of its export, if PEFT cannot load it."""
    if isinstance(base, AdaptedSource):
        return "an adapter itself", " --merge"
    if base.is_checkpoint:
        return "a run", ""
    if base.is_quantized:
        return "a compressed model", " --dequantize"
    return ("a folder in a bucket", "") if base.origin else None


def _fits(path: str, params: Container[str]) -> bool:
    """Returns whether a network with these parameters has a place for one of an adapter."""
    return path in params or lora.kernel_of(path) in params or path == prompt.PATH
