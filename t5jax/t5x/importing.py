"""T5X's checkpoints as runs: `t5jax import CHECKPOINT OUTPUT --vocabulary FILE`.

The run holds parameters to start from, as one made of a Hugging Face model does. On request it also
has Adafactor's state and stands at T5X's step: `t5jax train` goes on from there, with the
statistics, the schedule and the count of steps that T5X would have had. On request, because T5X's
usual gradient is a sum over the batch's tokens, where ours is a mean: statistics of the one would
bring updates to a halt that are made with the other, and the checkpoint does not tell.

T5X keeps no position in the data; they are read from their beginning.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from t5jax import checkpoint, sharding
from t5jax.architectures import MlpActivation, T5Config
from t5jax.config import AxisRules, Config, MeshConfig, OptimizerConfig
from t5jax.models import api
from t5jax.optimizers import make_optimizer
from t5jax.t5x import files, mapping
from t5jax.tokenizers import Tokenizer, load_tokenizer
from t5jax.train_state import TrainState, train_state_shapes, train_state_shardings


def is_t5x(model: str) -> bool:
    """Returns whether a name or path is a checkpoint of T5X's, or a file that could be one."""
    path = Path(model).expanduser()
    if model.startswith("gs://"):
        raise ValueError(
            f"{model} is in a bucket; copy it first: gcloud storage cp --recursive {model} ."
        )
    ours = checkpoint.is_run(path) or checkpoint.is_checkpoint(path)
    return not ours and files.is_checkpoint(path)


def import_t5x(
    model: str,
    output: str,
    *,
    vocabulary: str,
    mlp_activation: MlpActivation | None = None,
    loss_tokens: float | None = None,
    mesh: MeshConfig = MeshConfig(),
) -> list[str]:
    """Writes a T5X checkpoint as a run.

    Args:
      model: a msgpack file, or the folder of one step.
      output: the run's folder, which must not be a run yet.
      vocabulary: as `tokenizers.load_tokenizer` takes it; T5X has none in its checkpoints.
      mlp_activation: of a gated MLP, where no published size has the checkpoint's shapes.
      loss_tokens: target tokens that T5X's loss was summed over: those of a batch, or 1 where it
        was a mean. None: parameters alone, as step 0.
      mesh: devices that the state is split over on its way.
    Returns:
      lines that say what was found.
    Raises:
      ValueError: if there is nothing to tell the tokenizer or the activation; if the checkpoint is
        damaged, holds another network, or has no state to go on with; if the output cannot be
        written.
    """
    path = Path(model).expanduser()
    if checkpoint.is_run(Path(output)):
        raise ValueError(f"{output} holds a run already; choose another folder")
    tensors = files.open_tensors(path)
    if not vocabulary:
        raise ValueError(
            f"{model} is a T5X checkpoint, which has no tokenizer; give --vocabulary: a "
            'SentencePiece .model file (T5X\'s seqio.SentencePieceVocabulary names it), "bytes" '
            "(seqio.ByteVocabulary), or a folder with a tokenizer"
        )
    tokenizer = load_tokenizer(vocabulary)
    description = _describe(tensors, model, mlp_activation, tokenizer)
    has_adafactor, step = mapping.has_adafactor(tensors), mapping.step(tensors)
    goes_on = loss_tokens is not None
    if goes_on and not loss_tokens > 0:
        raise ValueError(f"--loss-tokens is {loss_tokens}; it must be above 0")
    if goes_on and not has_adafactor:
        raise ValueError(
            f"--loss-tokens is {loss_tokens}, but {model} has no state of Adafactor's to go on "
            "with; leave it out, to import the parameters alone"
        )
    run_dir = checkpoint.create_run_dir(output)

    # A momentum needs a place in the state; how fast it decays is the run's to say.
    momentum = 0.9 if goes_on and mapping.has_momentum(tensors) else None
    config = Config(model=description, optimizer=OptimizerConfig(b1=momentum), run_dir=output)
    tx = make_optimizer(config.optimizer, step, api.param_axes(description))
    shapes = train_state_shapes(description, tx)
    places = train_state_shardings(description, tx, sharding.make_mesh(mesh), AxisRules())
    params = mapping.load_params(tensors, description, model, places.params)
    lost: list[str] = []
    if goes_on:
        opt_state, lost = mapping.load_opt_state(tensors, description, shapes, places, loss_tokens)

    tokenizer.save(run_dir / checkpoint.TOKENIZER_DIR)
    checkpoint.write_config(run_dir, config)
    with checkpoint.Checkpoints(run_dir) as checkpoints:
        if goes_on:
            state = TrainState(jnp.int32(step), params, opt_state)
            checkpoints.save(step, state, {"imported": True}, config)  # See train.LoopState.
        else:
            checkpoints.save_params(params, config)
    return [
        f"{model}: {_summary(description)}",
        f"parameters of step {step}: --init.model {output} starts from them",
        *_on_adafactor(step, output, has_adafactor, goes_on, lost),
    ]


def _on_adafactor(
    step: int, output: str, has_adafactor: bool, goes_on: bool, lost: list[str]
) -> list[str]:
    """Returns what became of the optimizer's state, in lines to read."""
    if not has_adafactor:
        return ["no state of Adafactor's is in the checkpoint"]
    if not goes_on:
        return [
            "Adafactor's state was left behind; to go on with it, import with --loss-tokens, which "
            "--help explains"
        ]
    lines = [
        f"Adafactor's state: t5jax train CONFIG --run-dir {output} goes on from step {step}, up "
        "to train.steps"
    ]
    if lost:
        lines.append(
            f"Adafactor's statistics of {len(lost)} parameters begin anew, since the checkpoint "
            f"has none that fit: {', '.join(lost)}"
        )
    return lines


def _describe(
    tensors, model: str, activation: MlpActivation | None, tokenizer: Tokenizer
) -> T5Config:
    description = mapping.describe(tensors, model, activation)
    if tokenizer.vocab_size > description.vocab_size:
        raise ValueError(
            f"the vocabulary {tokenizer} has {tokenizer.vocab_size} ids, but {model} has "
            f"{description.vocab_size}; give the one that it was trained with"
        )
    return dataclasses.replace(description, eos_token_id=tokenizer.eos_id)


def _summary(model: T5Config) -> str:
    head = "tied head" if model.tie_word_embeddings else "head of its own"
    return (
        f"T5 with {model.num_encoder_layers} + {model.num_decoder_layers} layers, d_model "
        f"{model.d_model}, d_ff {model.d_ff}, {model.num_heads} heads of {model.d_kv}, vocabulary "
        f"{model.vocab_size}, {model.mlp_activation}, {head}"
    )
