"""Rotary embeddings in config.json, in the formats of both versions of transformers.

Version 4 has rope_theta, rope_scaling and, if local layers differ, rope_local_base_freq for these,
which are never scaled. Version 5 has all of these in rope_parameters, possibly for each kind of
layer. Both formats are written; if both are found, they must agree.
"""

from typing import Any

from t5jax.architectures import GPTConfig

KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
LOCAL_KEY = "rope_local_base_freq"
FULL, SLIDING = "full_attention", "sliding_attention"

# For each rope_type, their keys and our fields.
_SCALINGS = {
    "default": {},
    "linear": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "rope_low_frequency_factor",
        "high_freq_factor": "rope_high_frequency_factor",
        "original_max_position_embeddings": "rope_original_max_positions",
    },
}
_TYPE_OF = {"none": "default", "linear": "linear", "llama3": "llama3"}


def read_rope(
    raw: dict[str, Any], *, theta: float, local_theta: float | None = None
) -> dict[str, Any]:
    """Returns the fields of `GPTConfig` that begin with rope_.

    Args:
      raw: config.json.
      theta: the default of rope_theta in transformers.
      local_theta: the same for local layers, in families in which they differ.
    Raises:
      ValueError: if a scaling is not implemented, a value is not a number, or the two formats
        disagree.
    """
    theta, old = raw.get("rope_theta") or theta, raw.get("rope_scaling")
    local = raw.get(LOCAL_KEY) or local_theta
    new, new_local = raw.get("rope_parameters"), None
    if isinstance(new, dict) and set(new) & {FULL, SLIDING}:
        new_local, new = new.get(SLIDING), new.get(FULL)
    spellings = [
        _read(spelling, name, theta)
        for name, spelling in (("rope_scaling", old), ("rope_parameters", new))
        if spelling
    ]
    if len(spellings) == 2 and spellings[0] != spellings[1]:
        raise ValueError(
            f"config.json: rope_scaling {old} and rope_parameters {new} disagree; keep one of them"
        )
    fields = spellings[0] if spellings else _read({}, "rope_scaling", theta)
    if new_local:
        found = _read(new_local, f"rope_parameters.{SLIDING}", local or theta)
        if local is None and found != fields:
            raise ValueError(
                f"config.json: rope_parameters differ between layers ({raw['rope_parameters']}), "
                "which is not implemented; expected the same for all"
            )
        if local is not None and found["rope_scaling"] != "none":
            raise ValueError(
                f"config.json: rope_parameters.{SLIDING} is {new_local}, which is not implemented; "
                "expected local layers without scaling"
            )
        local = None if local is None else found["rope_theta"]
    return fields | {"rope_local_theta": local}


def _read(spelling: dict[str, Any], name: str, theta: float) -> dict[str, Any]:
    """Returns all fields in one format, so that two can be compared."""
    if not isinstance(spelling, dict):
        raise ValueError(f"config.json: {name} is {spelling!r}; expected an object, or null")
    kind = spelling.get("rope_type", spelling.get("type", "default"))
    if kind not in _SCALINGS:
        raise ValueError(
            f"config.json: {name} is of type {kind!r}, which is not implemented; expected one of "
            f"{', '.join(_SCALINGS)}"
        )
    keys = _SCALINGS[kind]
    harmless = {"rope_type", "type", "rope_theta"}
    if spelling.get("partial_rotary_factor") in (None, 1):
        harmless.add("partial_rotary_factor")
    strange = {key: value for key, value in spelling.items() if key not in {*keys, *harmless}}
    missing = [key for key in keys if spelling.get(key) is None]
    if strange or missing:
        raise ValueError(
            f"config.json: {name} of type {kind!r} has {strange or 'nothing else'}, and lacks "
            f"{', '.join(missing) or 'nothing'}; expected {', '.join(keys) or 'no other key'}"
        )
    numbers = {"rope_theta": spelling.get("rope_theta") or theta} | {
        field: spelling[key] for key, field in keys.items()
    }
    for field, value in numbers.items():
        whole = field == "rope_original_max_positions"
        if type(value) not in ((int,) if whole else (int, float)):
            raise ValueError(f"config.json: {name} is {spelling}; expected numbers, not {value!r}")
        numbers[field] = value if whole else float(value)
    ours = next(ours for ours, theirs in _TYPE_OF.items() if theirs == kind)
    return {"rope_scaling": ours, **dict.fromkeys(_SCALINGS["llama3"].values()), **numbers}


def write_rope(config: GPTConfig, *, local_theta: float | None = None) -> dict[str, Any]:
    """Returns the keys of config.json, in both formats.

    Args:
      local_theta: the base in local layers, in families in which they differ.
    """
    kind = _TYPE_OF[config.rope_scaling]
    scaling = {key: getattr(config, field) for key, field in _SCALINGS[kind].items()}
    scaling = {"rope_type": kind} | scaling
    parameters: dict[str, Any] = scaling | {"rope_theta": config.rope_theta}
    stretched = scaling if len(scaling) > 1 else None
    keys = {"rope_theta": config.rope_theta, "rope_scaling": stretched}
    if local_theta is not None:
        keys[LOCAL_KEY] = local_theta
        local = {"rope_type": "default", "rope_theta": local_theta}
        parameters = {FULL: parameters, SLIDING: local}
    return keys | {"rope_parameters": parameters}
