"""Conversion of models: export to a Hugging Face folder, import as a run."""

import dataclasses
import logging
from typing import Any, Literal

from t5jax import checkpoint, sharding, storage
from t5jax.architectures import Architecture, Dtype
from t5jax.config import MeshConfig
from t5jax.hf import ctranslate2
from t5jax.hf import io as hf_io
from t5jax.hf.files import check_destination
from t5jax.quantize import files as quantized_files
from t5jax.source import AdaptedSource, Source, find

_log = logging.getLogger(__name__)
_SHARD_BYTES = 5 * 10**9


def export_model(
    model: str | Source,
    output: str,
    *,
    dtype: Dtype = "float32",
    max_shard_bytes: int = _SHARD_BYTES,
    overwrite: bool = False,
    encoder_only: bool = False,
    format: Literal["huggingface", "ctranslate2", "peft"] | None = None,
    merge: bool = False,
    quantization: ctranslate2.Quantization | None = None,
    dequantize: bool = False,
) -> None:
    """Writes a model as a folder for Hugging Face or CTranslate2, an adapter as one for PEFT.

    Args:
      model: a Hub name, a Hugging Face folder, a run or one of its checkpoints; or a source.
      output: the folder to write.
      dtype: the dtype of the weights in the files.
      max_shard_bytes: the largest size of a file of weights; several files get an index.
      overwrite: replace an existing model.
      encoder_only: only write the encoder of a T5, as for transformers' T5EncoderModel.
      format: what is to read the folder. None: PEFT for a model with an adapter, which is written
        alone, and otherwise Hugging Face.
      merge: write the whole model, with the adapter merged.
      quantization: for CTranslate2: the type of its weights; None: dtype.
      dequantize: of a compressed model, write the floats that its matrices stand for.
    Raises:
      ValueError: if the model cannot be read, or the output cannot be written.
    """
    folder = storage.path(output, "the folder to write")
    source = find(model) if isinstance(model, str) else model
    source.warn_if_unrounded()
    _check_dequantize(source, dequantize)
    is_adapted = isinstance(source, AdaptedSource)
    if format == "peft" or merge:
        if not is_adapted:
            option = "merge" if merge else "format peft"
            raise ValueError(
                f"{source.path} has no adapter, so --{option} has no effect; leave it out"
            )
        if format == "peft" and merge:
            raise ValueError("format peft is of an adapter alone; leave out either it or merge")
    if format is None:
        format = "peft" if is_adapted and not merge else "huggingface"
    if format == "peft":
        whole = {
            "encoder_only": encoder_only,
            "quantization": quantization is not None,
            "dtype": dtype != "float32",
            "max_shard_bytes": max_shard_bytes != _SHARD_BYTES,
        }
        for option, given in whole.items():
            if given:
                raise ValueError(
                    f"{option} is of a whole model, and an adapter is written alone; set merge "
                    "(--merge), or leave it out"
                )
        assert isinstance(source, AdaptedSource)
        source.warn_of_prefixes(output)
        source.export_adapter(output, overwrite=overwrite)
        return
    source.check_whole()
    if format == "ctranslate2":
        if encoder_only:
            raise ValueError("CTranslate2 has no encoder of a T5 alone; leave encoder_only out")
        if max_shard_bytes != _SHARD_BYTES:
            raise ValueError(
                "CTranslate2 has one file of weights; leave max_shard_bytes (--max-shard-bytes) out"
            )
        check_destination(folder, overwrite)
        with storage.scratch_folder(folder) as made:
            floats = made.absolute() / "model"
            export_model(
                source, str(floats), dtype=dtype, format="huggingface", dequantize=dequantize
            )
            with storage.new_folder(folder, "model.bin") as partial:
                ctranslate2.convert(floats, partial, quantization, overwrite=True)
        return
    if quantization:
        raise ValueError(
            f"quantization {quantization} is for CTranslate2; set format to ctranslate2 (--format "
            "ctranslate2), or leave it out"
        )
    tokenizer = source.own_tokenizer()
    if tokenizer is None:
        _log.warning("%s holds no tokenizer, so only its weights are exported", source.path)
    source.warn_of_prefixes(output)
    description, params = source.read(encoder_only=encoder_only, dequantize=dequantize)
    hf_io.save_params(
        output,
        description,
        params,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
        generation=stopping(source.generation(), description),
        overwrite=overwrite,
    )


def _check_dequantize(source: Source, dequantize: bool) -> None:
    """Raises ValueError if a compressed model would be written as it is, or another dequantized."""
    if source.is_quantized and not dequantize:
        weights = quantized_files.read_scheme(source.path).weights
        raise ValueError(
            f"{source.path} holds {weights} matrices, for which neither transformers without "
            "further packages nor CTranslate2 has a format; add --dequantize (dequantize=True) to "
            "write the floats that they stand for, of which CTranslate2's --quantization int8 "
            "makes integers again"
        )
    if dequantize and not source.is_quantized:
        raise ValueError(
            f"{source.path} is not compressed, so --dequantize (dequantize) has no effect; leave "
            "it out"
        )


def stopping(generation: dict[str, Any], model: Architecture) -> dict[str, Any]:
    """Returns generation_config.json with every id that ends a text here, those it has first."""
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not ends or set(model.end_token_ids) <= set(ends):
        return generation
    return generation | {"eos_token_id": list(dict.fromkeys([*ends, *model.end_token_ids]))}


def import_model(model: str | Source, output: str, *, mesh: MeshConfig = MeshConfig()) -> None:
    """Writes a model as a run whose step 0 has its parameters.

    Args:
      model: a Hub name, a Hugging Face folder, a run or one of its checkpoints; or a source.
      output: the run's folder.
      mesh: the devices over which the parameters are sharded meanwhile.
    Raises:
      ValueError: if the output already is a run, or cannot be written.
    """
    if checkpoint.is_run(storage.path(output, "the run's folder")):
        raise ValueError(f"{output} holds a run already; choose another folder")
    source = find(model) if isinstance(model, str) else model
    source.check_whole()
    if source.is_quantized:
        raise ValueError(
            f"{source.path} holds a compressed model, and a run has float parameters; import a "
            f"folder that `t5jax export {source.path} FOLDER --dequantize` writes"
        )
    run_dir = checkpoint.create_run_dir(output)
    description, params = source.read(mesh=sharding.make_mesh(mesh))
    # The parameters of a run with an average are the average, and an adapter is merged.
    optimizer = dataclasses.replace(source.config.optimizer, ema=None)
    config = dataclasses.replace(
        source.config, model=description, run_dir=output, optimizer=optimizer, adapter=None
    )
    with storage.staged(run_dir, folder=True, fetch=lambda _: False) as reports:
        source.tokenizer().save(reports.path / checkpoint.TOKENIZER_DIR)
        hf_io.save_generation(reports.path / checkpoint.TOKENIZER_DIR, source.generation())
        checkpoint.write_config(reports.path, config)
    with checkpoint.Checkpoints(run_dir) as checkpoints:
        checkpoints.save_params(params, config)
