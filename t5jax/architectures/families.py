"""The table of families: where the description, the network and the Hugging Face table of each are.

A family is named after the `model_type` of its checkpoints. Its published sizes, and what its
checkpoints fix of a description that it shares with others, are in `t5jax/architectures/FAMILY.py`.
"""

import dataclasses
import importlib
from types import ModuleType
from typing import Any

# Modules are named here and imported when they are asked for: configs load without jax.


@dataclasses.dataclass(frozen=True)
class Family:
    """The parts of a family, each in its own folder."""

    description: str
    """In t5jax/architectures: module and class, below `Architecture`."""
    network: str
    """In t5jax/models: module with the Network, and what `models/api.py` asks beside it."""
    table: str
    """In t5jax/hf: module with TABLE, both directions of its checkpoints."""

    def load_description(self) -> type[Any]:
        """Returns the class of its descriptions."""
        module, name = self.description.split(".")
        found: type[Any] = getattr(importlib.import_module(f"t5jax.architectures.{module}"), name)
        return found

    def load_network(self) -> ModuleType:
        """Returns the module of its network."""
        return importlib.import_module(f"t5jax.models.{self.network}")

    def load_table(self) -> Any:
        """Returns its `t5jax.hf.mapping.Table`."""
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
    """Returns the module of a family's published SIZES, and its check of a shared description."""
    return importlib.import_module(f"t5jax.architectures.{family}")
