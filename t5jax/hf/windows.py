"""Local layers in config.json: layer_types, a list of the kinds of all layers."""

from typing import Any

from t5jax.architectures import GPTConfig, LayerKind
from t5jax.hf.rope import FULL, SLIDING

_KINDS: dict[str, LayerKind] = {FULL: "global", SLIDING: "local"}


def read_layers(
    raw: dict[str, Any], num_layers: int, default: list[LayerKind], window: int | None
) -> dict[str, Any]:
    """Returns the fields layer_pattern and sliding_window of `GPTConfig`.

    Args:
      raw: config.json.
      default: the kinds of the layers if there is no layer_types.
      window: sliding_window.
    Raises:
      ValueError: if the number of layers differs, a kind is not implemented, or there are local
        layers without a window.
    """
    types = raw.get("layer_types")
    kinds = default
    if types is not None:
        strange = sorted({str(t) for t in types} - set(_KINDS))
        if strange or len(types) != num_layers:
            raise ValueError(
                f"config.json: layer_types has {len(types)} entries, among them "
                f"{', '.join(strange) or 'no unknown kind'}; expected {num_layers}, each "
                f"{' or '.join(_KINDS)}"
            )
        kinds = [_KINDS[t] for t in types]
    if "local" not in kinds:
        return {"layer_pattern": ("global",), "sliding_window": None}
    if window is None:
        raise ValueError(
            "config.json: sliding_window is null, but there are local layers; expected a number"
        )
    length = next(n for n in range(1, len(kinds) + 1) if _repeats(kinds, n))
    return {"layer_pattern": tuple(kinds[:length]), "sliding_window": window}


def _repeats(kinds: list[LayerKind], length: int) -> bool:
    return all(kind == kinds[i % length] for i, kind in enumerate(kinds))


def write_layer_types(config: GPTConfig) -> list[str]:
    return [SLIDING if is_local else FULL for is_local in config.local_layers]
