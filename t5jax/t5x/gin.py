"""What config.gin, which T5X writes beside the checkpoints of a run, says of the network."""

import re
from pathlib import Path

from t5jax.architectures import MlpActivation

_BINDING = re.compile(r"^\s*[\w./]*T5Config\.mlp_activations\s*=[\s\\]*\(([^)]*)\)", re.MULTILINE)
_ACTIVATIONS: dict[tuple[str, ...], MlpActivation] = {
    ("relu",): "relu",
    ("gelu", "linear"): "gated-gelu",
    ("silu", "linear"): "gated-silu",
    ("swish", "linear"): "gated-silu",
}


def activation(checkpoint: Path) -> MlpActivation | None:
    """Returns the activation of the MLP, None if there is no such file or it does not say.

    Args:
      checkpoint: a file, or the folder of one step.
    Raises:
      ValueError: if it is one that is not implemented.
    """
    file = checkpoint.absolute().parent / "config.gin"
    if not file.is_file():
        return None
    found = _BINDING.findall(file.read_text(encoding="utf-8", errors="replace"))
    if not found:
        return None
    names = tuple(re.findall(r"\w+", found[-1]))
    if names not in _ACTIVATIONS:
        raise ValueError(
            f"{file}: mlp_activations are {names}, which is not implemented; expected one of "
            f"{', '.join(map(str, _ACTIVATIONS))}"
        )
    return _ACTIVATIONS[names]
