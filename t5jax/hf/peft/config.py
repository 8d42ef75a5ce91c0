"""adapter_config.json: which of its keys are read, refused, or without effect here."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5jax.architectures import Classifier
from t5jax.hf.files import ADAPTER, read_json

MERGE_THERE = "merge it with peft (merge_and_unload, then save_pretrained), and take that model"
"""What to do about an adapter that cannot be read here."""

# The types of what is read; all but the first two may be null.
_KINDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "alpha_pattern": (dict,),
    "auto_mapping": (dict,),
    "base_model_name_or_path": (str,),
    "modules_to_save": (list,),
    "num_virtual_tokens": (int,),
    "peft_type": (str,),
    "rank_pattern": (dict,),
    "revision": (str,),
    "task_type": (str,),
    "use_dora": (bool,),
    "use_rslora": (bool,),
}
# Keys that say how an adapter was made or will be trained, or which modules it has, which its
# tensors say themselves.
_HARMLESS = re.findall(
    r"\w+",
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora
    modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern
    megatron_core loftq_config eva_config corda_config lora_ga_config use_dora qalora_group_size
    runtime_config ensure_weight_tying eva_state_dict
    """,
)
# Keys that change what is computed: not implemented here.
_REFUSED = (
    "megatron_config",
    "trainable_token_indices",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
_INITS = (True, False, "gaussian", "eva", "orthogonal")

# What an adapter is for, by its task_type or the class of its base.
_HEADS: dict[str, Classifier] = {
    "SEQ_CLS": "sequence_classification",
    "TOKEN_CLS": "token_classification",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
}


def read_config(folder: Path) -> dict[str, Any]:
    """Returns an adapter's adapter_config.json.

    Raises:
      ValueError: if it cannot be read, or a value that is read has another type than PEFT's.
    """
    config = read_json(folder / ADAPTER)
    for key, kinds in _KINDS.items():
        value = config.get(key)
        may_be_null = key not in config or key not in ("r", "lora_alpha")
        if not (type(value) in kinds or (value is None and may_be_null)):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"{folder / ADAPTER}: {key} is {value!r}; expected a value of type {expected}"
            )
    return config


def head_of(config: Mapping[str, Any]) -> Classifier | None:
    """Returns the head of a classifier that an adapter is for, None for others."""
    base = str((config.get("auto_mapping") or {}).get("base_model_class"))
    names = (config.get("task_type"), base)
    found = [head for end, head in _HEADS.items() if any(n and n.endswith(end) for n in names)]
    return found[0] if found else None


def check_lora(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for what is not implemented; warns of keys that are not known.

    Args:
      config: as `read_config` returns it, of another kind than a soft prompt.
      where: the file, for messages.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{where}: peft_type is {kind!r}, which is not implemented; expected LORA or "
            "PROMPT_TUNING"
        )
    for key in _REFUSED:
        if config.get(key):
            raise ValueError(
                f"{where}: {key} is {config[key]!r}, which is not implemented; {MERGE_THERE}"
            )
    if config.get("init_lora_weights", True) not in _INITS:
        raise ValueError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which also changes "
            "the base's weights; save the adapter with peft's "
            "path_initial_model_for_weight_conversion, which makes a plain one of it"
        )
    if unknown := sorted(set(config) - {*_HARMLESS, *_REFUSED}):
        warnings.warn(
            f"{where} has keys that are not known here and change nothing: "
            f"{', '.join(f'{key}={config[key]!r}' for key in unknown)}",
            stacklevel=4,
        )


def scale(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """Returns alpha over the rank, of a module of theirs, as PEFT finds it.

    Args:
      config: as `read_config` returns it.
      module: its name in the model that was adapted, which patterns are of.
      rank: that of its tensors.
      where: the folder, for messages.
    Raises:
      ValueError: if the rank is another one here, or a pattern or a number is none.
    """

    def of(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            try:
                matches = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise ValueError(
                    f"{where}: {ADAPTER} has the pattern {pattern!r}, which is none: {error}"
                ) from None
            if matches:
                return value
        return default

    expected = of(config.get("rank_pattern"), config.get("r", 8))
    if rank != expected:
        raise ValueError(
            f"{where}: {module} has rank {rank} in the tensors, but {expected} in {ADAPTER}"
        )
    alpha = of(config.get("alpha_pattern"), config.get("lora_alpha", 8))
    if not rank or type(alpha) not in (int, float):
        raise ValueError(
            f"{where}: {module} has the rank {rank} and the alpha {alpha!r} in {ADAPTER}; expected "
            "numbers, the rank above 0"
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
