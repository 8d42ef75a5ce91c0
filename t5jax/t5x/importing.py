"""T5X's checkpoints as runs: `t5jax import CHECKPOINT OUTPUT --vocabulary FILE`.

By default the run contains parameters to start from, like one imported from a Hugging Face model.
On request it also has Adafactor's state and T5X's step, so that `t5jax train` continues with T5X's
statistics, schedule and step count. This needs to know how T5X normalized its loss, which is not in
the checkpoint: usually its gradient is a sum over the batch's tokens, where ours is a mean, and
unscaled statistics would make updates vanish.

T5X does not save its position in the data; they are read from the beginning.
"""

import dataclasses

import jax.numpy as jnp

from t5jax import checkpoint, sharding, storage
from t5jax.architectures import MlpActivation, T5Config
from t5jax.config import AxisRules, Config, MeshConfig, OptimizerConfig
from t5jax.hf.mapping import Tensors
from t5jax.models import api
from t5jax.optimizers import make_optimizer
from t5jax.t5x import files, gin, mapping
from t5jax.tokenizers import Tokenizer, load_tokenizer
from t5jax.train_state import TrainState, train_state_shapes, train_state_shardings


def is_t5x(model: str) -> bool:
    """Returns whether a name or path is a T5X checkpoint, or a file that could be one."""
    path = storage.path(model, "the model")
    if checkpoint.is_run(path) or checkpoint.is_checkpoint(path):
        return False
    return files.is_checkpoint(path)


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
      output: the run's folder, which must not contain a run.
      vocabulary: as for `tokenizers.load_tokenizer`; there is none in T5X's checkpoints.
      mlp_activation: the activation of the MLP. None: what a config.gin beside the checkpoint says,
        or else that of a published size with the same shapes.
      loss_tokens: the number of target tokens that T5X's loss was summed over: those of a batch, or
        1 if it was a mean. None: only parameters, as step 0.
      mesh: the devices over which the state is sharded meanwhile.
    Returns:
      Lines that describe what was found.
    Raises:
      ValueError: if the tokenizer or the activation is not known; if the checkpoint is damaged,
        contains another network, or has no state to continue with; if the output cannot be written.
    """
    place = storage.path(model, "the model")
    path = storage.local(place, what="checkpoint")
    if checkpoint.is_run(storage.path(output, "the run's folder")):
        raise ValueError(f"{output} holds a run already; choose another folder")
    tensors = files.open_tensors(path)
    if not vocabulary:
        raise ValueError(
            f"{model} is a T5X checkpoint, which has no tokenizer; give --vocabulary: a "
            'SentencePiece .model file (T5X\'s seqio.SentencePieceVocabulary names it), "bytes" '
            "(seqio.ByteVocabulary), or a folder with a tokenizer"
        )
    tokenizer = load_tokenizer(vocabulary)
    mlp_activation = mlp_activation or gin.activation(place)
    description = _describe(tensors, model, mlp_activation, tokenizer)
    has_adafactor, step = mapping.has_adafactor(tensors), mapping.step(tensors)
    if loss_tokens is not None and not loss_tokens > 0:
        raise ValueError(f"--loss-tokens is {loss_tokens}; it must be above 0")
    if loss_tokens is not None and not has_adafactor:
        raise ValueError(
            f"--loss-tokens is {loss_tokens}, but {model} has no state of Adafactor's to go on "
            "with; leave it out, to import the parameters alone"
        )
    run_dir = checkpoint.create_run_dir(output)

    # Momentum has a slot in the state; its decay is set by the run's config.
    has_momentum = loss_tokens is not None and mapping.has_momentum(tensors)
    momentum = 0.9 if has_momentum else None
    config = Config(model=description, optimizer=OptimizerConfig(b1=momentum), run_dir=output)
    tx = make_optimizer(config.optimizer, step, api.param_axes(description))
    shapes = train_state_shapes(description, tx)
    devices = sharding.make_mesh(mesh)
    rules = sharding.divisible_rules(
        api.param_axes(description), shapes.params, devices, AxisRules()
    )
    places = train_state_shardings(description, tx, devices, rules)
    params = mapping.load_params(tensors, description, model, places.params)
    lost: list[str] = []
    if loss_tokens is not None:
        opt_state, lost = mapping.load_opt_state(tensors, description, shapes, places, loss_tokens)

    with storage.staged(run_dir, folder=True, fetch=lambda _: False) as reports:
        tokenizer.save(reports.path / checkpoint.TOKENIZER_DIR)
        checkpoint.write_config(reports.path, config)
    with checkpoint.Checkpoints(run_dir) as checkpoints:
        if loss_tokens is not None:
            state = TrainState(jnp.int32(step), params, opt_state)
            checkpoints.save(step, state, {"imported": True}, config)  # See train.LoopState.
        else:
            checkpoints.save_params(params, config)
    return [
        f"{model}: {_summary(description)}",
        f"parameters of step {step}: --init.model {output} starts from them",
        *_on_adafactor(step, output, has_adafactor, loss_tokens is not None, lost),
    ]


def _on_adafactor(
    step: int, output: str, has_adafactor: bool, goes_on: bool, lost: list[str]
) -> list[str]:
    """Returns lines that describe the conversion of the optimizer's state."""
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
    tensors: Tensors, model: str, activation: MlpActivation | None, tokenizer: Tokenizer
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
