"""Distillation: a student learns the probabilities that a teacher gives to all tokens.

Hinton et al. 2015 (arXiv:1503.02531). The teacher is an argument of the training step: neither a
constant of the program nor part of the state and its checkpoints; or it is asked beforehand
(`cache.py`). It may be of another size or
family, but both have the same vocabulary: of pieces, since two of the same size may differ.
The loss is `losses.distillation`.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from t5jax import sharding, trees
from t5jax.architectures import Architecture
from t5jax.batch import BatchSpec
from t5jax.config import Config
from t5jax.models import api
from t5jax.source import Source, find
from t5jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model on the devices of a run."""

    source: Source
    model: Architecture
    shapes: Any
    """ShapeDtypeStructs of its parameters."""
    shardings: Any

    def params(self) -> api.Params:
        """Reads its parameters."""
        return self.source.params(self.model, self.shardings)


def find_teacher(config: Config, mesh: jax.sharding.Mesh) -> Teacher | None:
    """Returns the teacher of a run, None if it has none.

    Raises:
      ValueError: if it cannot be found, or is of another kind than the student.
    """
    name, student = config.distill.teacher, config.model
    if not name:
        return None
    source = find(name)
    source.check_whole()
    if source.model.kind != student.kind:
        kinds = {"encoder_decoder": "an encoder-decoder", "decoder": "a decoder"}
        raise ValueError(
            f"distill.teacher {name} is {kinds.get(source.model.kind, 'an encoder')}, but the "
            f"model is {kinds.get(student.kind, 'an encoder')}: they do not read the same rows; "
            "take a teacher of the same kind"
        )
    # It computes as the student does, and is not trained: its parameters need no more precision.
    model = dataclasses.replace(
        source.model.computed_as(student), dropout_rate=0.0, param_dtype=student.dtype
    )
    axes, shapes = api.param_axes(model), api.param_shapes(model)
    rules = sharding.divisible_rules(axes, shapes, mesh, config.axes)
    return Teacher(source, model, shapes, sharding.param_shardings(axes, shapes, mesh, rules))


def num_ids(config: Config, teacher: Teacher) -> int:
    """Returns how many ids both models have."""
    return min(config.model.vocab_size, teacher.model.vocab_size)


def num_kept(config: Config, teacher: Teacher) -> int:
    """Returns how many ids are kept of each target."""
    return min(config.distill.top_k or num_ids(config, teacher), num_ids(config, teacher))


def check_teacher(
    teacher: Teacher, student: Architecture, tokenizer: Tokenizer, spec: BatchSpec
) -> None:
    """Raises ValueError if a teacher would read a student's rows otherwise than the student.

    Args:
      teacher: the teacher.
      student: the description of what is trained.
      tokenizer: of the run.
      spec: the shape of its batches.
    """
    name, theirs = teacher.source.path, teacher.source.tokenizer()
    if difference := _difference(theirs, tokenizer):
        raise ValueError(
            f"distill.teacher {name} has another vocabulary: {difference}; train the student with "
            f"the teacher's (--data.vocabulary {teacher.source.tokenizer_folder}), or take another "
            "teacher"
        )
    for what, model in (("teacher", teacher.model), ("student", student)):
        if model.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"the {what} has {model.vocab_size} embeddings for {tokenizer.vocab_size} ids; "
                "give it a vocab_size that is as large"
            )
    ours, start = student.start_token_id, teacher.model.start_token_id
    if ours != start:
        raise ValueError(
            f"distill.teacher {name} begins texts with the id {start}, the student with {ours}; "
            f"set model.decoder_start_token_id to {start}"
        )
    both_ways = teacher.source.config.data.prefix_lm
    has_prompts = student.kind == "decoder" and spec.inputs_length > 0
    if has_prompts and (spec.kind == "prefix_lm") != both_ways:
        raise ValueError(
            f"distill.teacher {name} reads prompts {'both ways' if both_ways else 'causally'}, and "
            f"the student does not; set data.prefix_lm to {both_ways}"
        )
    longest = teacher.model.longest_row
    length = max(filter(None, (spec.decoder_length, spec.inputs_length)))
    if longest is not None and length > longest:
        raise ValueError(
            f"distill.teacher {name} has {longest} positions, but rows have {length} tokens; set "
            "data.inputs_length and data.targets_length lower"
        )


def _difference(theirs: Tokenizer, ours: Tokenizer) -> str:
    """Returns what differs between two vocabularies, "" if they are the same."""
    if repr(theirs) == repr(ours):
        return ""
    if theirs.vocab_size != ours.vocab_size:
        return f"{theirs.vocab_size} ids, not {ours.vocab_size}"
    for what in ("eos_id", "pad_id", "unk_id"):
        if getattr(theirs, what) != getattr(ours, what):
            return f"its {what} is {getattr(theirs, what)}, not {getattr(ours, what)}"
    pieces = [_pieces(tokenizer) for tokenizer in (theirs, ours)]
    for i, (their, our) in enumerate(zip(*pieces, strict=True)):
        if their != our:
            return f"its id {i} is {their!r}, not {our!r}"
    return ""


def _pieces(tokenizer: Tokenizer) -> list[Any]:
    if hasattr(tokenizer, "token_bytes"):
        return list(tokenizer.token_bytes())
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]


# --- Initial parameters -------------------------------------------------------------------------


def student_params(
    teacher: Teacher, params: api.Params, student: Architecture, shardings: Any
) -> api.Params:
    """Returns a student's first parameters: those of some of the teacher's layers, and all others.

    Of 12 layers, a student of 6 begins with 0, 2, 4, 7, 9 and 11.

    Args:
      teacher: a teacher as wide as the student.
      params: its parameters.
      student: the description.
      shardings: of the student's parameters.
    Raises:
      ValueError: if the two differ in more than the number of layers.
    """
    shapes, theirs = trees.flatten(api.param_shapes(student)), trees.flatten(params)
    axes, places = trees.flatten(api.param_axes(student)), trees.flatten(shardings)
    chosen: dict[str, jax.Array] = {}
    for path, shape in shapes.items():
        x = theirs.get(path)
        stacked = "layers" in axes[path]
        if x is None or x.shape[stacked:] != shape.shape[stacked:]:
            has = "no such parameter" if x is None else f"{list(x.shape)}"
            raise ValueError(
                f"distill.init_layers: {path} is {list(shape.shape)} in the student, and the "
                f"teacher has {has}; the two may differ in their numbers of layers alone"
            )
        if stacked and x.shape[0] < shape.shape[0]:
            raise ValueError(
                f"distill.init_layers: the student has {shape.shape[0]} layers, and the teacher "
                f"only {x.shape[0]}; leave it out, or make the student smaller"
            )
        if stacked:
            layers = np.linspace(0, x.shape[0] - 1, shape.shape[0]).round().astype(int)
            kinds = [getattr(m, "local_layers", None) for m in (teacher.model, student)]
            if kinds[0] and [kinds[0][i] for i in layers] != list(kinds[1] or ()):
                raise ValueError(
                    "distill.init_layers: layers of the teacher that are local would be global in "
                    "the student, or the other way round; leave it out"
                )
            x = x[layers]
        # A copy, since the state is donated and the teacher is not.
        chosen[path] = jax.device_put(np.asarray(x).astype(shape.dtype), places[path])
    return trees.unflatten(chosen)
