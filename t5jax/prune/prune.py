"""`t5jax prune`: writes a model with fewer weights, heads or MLP columns."""

from collections.abc import Sequence
from typing import Literal

import jax

from t5jax import storage
from t5jax.architectures import Dtype
from t5jax.checks import check_choice
from t5jax.hf.files import check_destination
from t5jax.models import api
from t5jax.prune import magnitude_masks, narrow, prunable, sparsity_of
from t5jax.prune.folder import find_floats, sizes, write
from t5jax.prune.masks import Scope, apply_masks, check_pattern
from t5jax.source import Source

Pattern = Literal["unstructured", "2:4", "heads", "mlp"]


def prune_model(
    model: str | Source,
    output: str,
    *,
    sparsity: float = 0.5,
    pattern: Pattern = "unstructured",
    scope: Scope | None = None,
    keep: Sequence[str] = (),
    dtype: Dtype = "float32",
    overwrite: bool = False,
) -> str:
    """Writes a pruned model as a Hugging Face folder.

    Args:
      model: a Hub name, a Hugging Face folder, a run or one of its checkpoints; or a source.
      output: the folder to write.
      sparsity: the share to remove: of the weights, the heads or the MLP columns.
      pattern: which weights: single ones of small magnitude ("unstructured"), the two smallest of
        every four inputs ("2:4"), whole attention heads ("heads") or MLP columns ("mlp").
      scope: unstructured: choose in each layer's matrix ("layer", the default) or among all weights
        together ("global").
      keep: shell patterns of the paths of matrices that stay as they are.
      dtype: the dtype of the weights in the files.
      overwrite: replace an existing model.
    Returns:
      What was done, in a sentence.
    Raises:
      ValueError: if the model cannot be read or pruned so, or the output cannot be written.
    """
    _check(pattern, sparsity, scope, keep)
    check_destination(storage.path(output, "the folder to write"), overwrite)
    source = find_floats(model)
    axes = api.param_axes(source.model)
    if pattern == "heads" or pattern == "mlp":
        description, params = source.read()
        smaller, params = narrow(description, params, pattern, sparsity)
        said = sizes(description, smaller)
    else:
        paths = prunable(axes, keep)
        check_pattern(api.param_shapes(source.model), axes, paths, pattern, scope or "layer")
        smaller, params = source.read()

        @jax.jit
        def prune(params: api.Params) -> api.Params:
            masks = magnitude_masks(
                params, axes, paths, sparsity, pattern=pattern, scope=scope or "layer"
            )
            return apply_masks(params, masks)

        params = prune(params)
        found = sparsity_of(params, paths)
        said = (
            f"{found.zeros:,} of {found.weights:,} weights of {len(paths)} matrices are 0 "
            f"({found.share:.2%})"
        )
    write(source, output, smaller, params, source.own_tokenizer(), dtype, overwrite)
    return said


def _check(pattern: str, sparsity: float, scope: str | None, keep: Sequence[str]) -> None:
    check_choice(pattern, ("unstructured", "2:4", "heads", "mlp"), "--pattern")
    if not 0 < sparsity < 1:
        raise ValueError(f"--sparsity is {sparsity}; it must be above 0 and below 1")
    if pattern == "2:4" and sparsity != 0.5:
        raise ValueError(f"--sparsity is {sparsity}, but 2:4 removes a half; leave it out")
    if scope and pattern != "unstructured":
        raise ValueError(
            f"--scope {scope} has no use with --pattern {pattern}, which chooses in each layer; "
            "leave it out"
        )
    if keep and pattern in ("heads", "mlp"):
        raise ValueError(
            f"--keep {' '.join(keep)} has no use with --pattern {pattern}: all layers of a model "
            "have the same size; leave it out"
        )
