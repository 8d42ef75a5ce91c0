"""Which of PEFT's modules is which matrix of ours, by the families' tables."""

import dataclasses

import numpy as np

from t5jax.adapters import lora
from t5jax.architectures import FAMILIES, Architecture
from t5jax.hf.mapping import Part, Rearrange, Row, Table, Tensor

PREFIX = "base_model.model."
TENSORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


@dataclasses.dataclass(frozen=True)
class Module:
    """A matrix of ours, or a part of a matrix of theirs."""

    path: str
    """The path of our module."""
    matrix: lora.Matrix
    row: Row

    @property
    def theirs(self) -> str:
        return self.row.theirs.removesuffix(".weight")

    @property
    def view(self) -> Rearrange:
        view = self.row.view.view if isinstance(self.row.view, Part) else self.row.view
        assert isinstance(view, Rearrange)
        return view

    @property
    def is_transposed(self) -> bool:
        """Whether theirs is [in, out], as PEFT's fan_in_fan_out says."""
        inputs, first = self._dims[0], self.view.their_groups[0]
        return inputs == first

    @property
    def _dims(self) -> tuple[list[str], list[str]]:
        """The names of the inputs' dimensions and of the outputs'."""
        ours = self.view.our_axes
        dims = ours[: self.matrix.num_inputs], ours[self.matrix.num_inputs :]
        # Otherwise a factor would have to be permuted, too.
        assert sorted(dims) == sorted(self.view.their_groups), self.view.pattern
        return dims

    @property
    def num_layers(self) -> int:
        return self.matrix.shape[0] if self.matrix.stacked else 1

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of inputs and outputs."""
        own = self.matrix.shape[self.matrix.stacked :]
        inputs, outputs = own[: self.matrix.num_inputs], own[self.matrix.num_inputs :]
        return int(np.prod(inputs)), int(np.prod(outputs))

    @property
    def part(self) -> tuple[int, int]:
        """Which part of theirs, and how many there are."""
        view = self.row.view
        return (view.place, view.count) if isinstance(view, Part) else (0, 1)

    def names(self) -> list[str]:
        """Returns the names of theirs, of each layer."""
        return [self.theirs.format(layer=layer) for layer in range(self.num_layers)]


def modules_of(model: Architecture) -> dict[str, Module]:
    """Returns the matrices that can be adapted, by path, in the order of the table."""
    known = lora.matrices(model)
    return {
        path: Module(path, known[path], row)
        for row in table_of(model).rows(model)
        if (path := row.ours.removesuffix("/kernel")) in known and row.ours.endswith("/kernel")
    }


def check_gathered(name: str, tensor: Tensor, where: str) -> None:
    """Raises ValueError for a tensor of which only a part may have been saved."""
    is_matrix = name.endswith((*TENSORS[:2], "prompt_embeddings"))
    if not tensor.shape or 0 in tensor.shape or (is_matrix and len(tensor.shape) != 2):
        raise ValueError(
            f"{where} is not whole: {name} is {list(tensor.shape)}, as of an adapter that was "
            "saved under DeepSpeed or FSDP without gathering its parameters; save it again"
        )


def table_of(model: Architecture) -> Table:
    table: Table = FAMILIES[model.family].load_table()
    return table
