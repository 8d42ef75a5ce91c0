"""The table of families: where each one's description, network and Hugging Face table are.

A family is named after the `model_type` of its checkpoints. Its published sizes, and the checks of
a description that it shares with other families, are in `t5jax/architectures/FAMILY.py`.
"""

import dataclasses
import importlib
from types import ModuleType
from typing import Any

# Modules are named here and imported on demand, so that configs load without jax.


@dataclasses.dataclass(frozen=True)
class Family:
    """The modules of a family, one in each folder."""

    description: str
    """Module and class in t5jax/architectures; a subclass of `Architecture`."""
    network: str
    """Module in t5jax/models, with the Network and the functions that `models/api.py` calls."""
    table: str
    """Module in t5jax/hf, with TABLE for both directions of the conversion of checkpoints."""

    def load_description(self) -> type[Any]:
        """Returns the class of the description."""
        module, name = self.description.split(".")
        found: type[Any] = getattr(importlib.import_module(f"t5jax.architectures.{module}"), name)
        return found

    def load_network(self) -> ModuleType:
        """Returns the module of the network."""
        return importlib.import_module(f"t5jax.models.{self.network}")

    def load_table(self) -> Any:
        """Returns the `t5jax.hf.mapping.Table`."""
        return importlib.import_module(f"t5jax.hf.{self.table}").TABLE


FAMILIES: dict[str, Family] = {
    "t5": Family("t5.T5Config", network="t5", table="t5"),
    "gpt2": Family("gpt.GPTConfig", network="gpt", table="gpt2"),
    "llama": Family("gpt.GPTConfig", network="gpt", table="llama"),
    "mistral": Family("gpt.GPTConfig", network="gpt", table="mistral"),
    "qwen3": Family("gpt.GPTConfig", network="gpt", table="qwen3"),
    "gemma2": Family("gpt.GPTConfig", network="gpt", table="gemma2"),
    "gemma3": Family("gpt.GPTConfig", network="gpt", table="gemma3"),
    "bert": Family("bert.BertConfig", network="bert", table="bert"),
    "t5gemma": Family("t5gemma.T5GemmaConfig", network="t5gemma", table="t5gemma"),
}


def load_sizes(family: str) -> ModuleType:
    """Returns the module with a family's published SIZES and its check of a shared description."""
    return importlib.import_module(f"t5jax.architectures.{family}")
