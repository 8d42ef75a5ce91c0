"""LoRA and soft prompts in the format of the PEFT library: `reading.py` and `writing.py`.

A folder has adapter_config.json (`config.py`) and adapter_model.safetensors.

Tensors lie beside their modules, in torch's layout: `lora_A.weight` [R, in], `lora_B.weight`
[out, R], `lora_magnitude_vector` [out], for matrices [out, in] and for GPT-2's [in, out] alike.
Which module is which parameter of ours is said by the families' tables (`t5jax/hf/mapping.py`).
GPT-2 joins queries, keys and values in one matrix: their adapters become one of the sum of their
ranks, and one of theirs becomes three.

Source: peft 0.21 (`tuners/lora`, `utils/save_and_load.py`).

L layers, R rank.
"""

from pathlib import Path

from t5jax.hf.files import ADAPTER, CONFIG, weight_files
from t5jax.hf.peft.config import read_config
from t5jax.hf.peft.reading import model_of, read
from t5jax.hf.peft.writing import save

__all__ = ["base_of", "is_adapter", "is_prompt", "model_of", "read", "revision_of", "save"]


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds an adapter alone, perhaps with the config.json of its base."""
    if not (folder / ADAPTER).is_file():
        return False
    return not ((folder / CONFIG).is_file() and weight_files(folder))


def is_prompt(folder: Path) -> bool:
    """Returns whether the adapter in a folder is a soft prompt."""
    return read_config(folder).get("peft_type") == "PROMPT_TUNING"


def base_of(folder: Path) -> str:
    """Returns the name or path of an adapter's base, "" if it is not said."""
    return read_config(folder).get("base_model_name_or_path") or ""


def revision_of(folder: Path) -> str | None:
    """Returns which revision of its base on the Hub an adapter is of; None: the newest."""
    return read_config(folder).get("revision")
