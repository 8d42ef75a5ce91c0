"""`t5jax compress`."""

import dataclasses
import sys
from typing import Literal

from t5jax.commands.parse import check_options, check_used, model_first, parse


@dataclasses.dataclass(frozen=True)
class Compress:
    """Writes a model with its matrices rounded to 8 or 4 bits, for every command that takes MODEL.

    Prints the bytes before and after, and with --tasks the quality and speed beside those of the
    uncompressed model.
    """

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint; or --model
    MODEL."""
    output: str
    """Folder to write, which does not exist yet."""
    base: str = ""
    """Of an adapter: where its base is now. Empty: where the adapter says."""
    weights: Literal["int8", "int4", "nf4", "fp8"] = "int8"
    """What matrices are rounded to: int8 and fp8 (e4m3) by output channel, int4 and nf4 by
    group."""
    activations: Literal["int8"] | None = None
    """int8: also round the inputs of products, and multiply integers. Needs --weights int8."""
    group: int | None = None
    """int4, nf4: inputs per scale. None: 128, of nf4 64."""
    keep: tuple[str, ...] = ()
    """Shell patterns of paths of matrices that stay float, such as "token_embedder/*"."""
    kv_cache: Literal["int8"] | None = None
    """int8: it keeps keys and values in int8 as it writes, with a scale for each token and
    head."""
    method: Literal["rtn", "awq", "gptq"] = "rtn"
    """rtn rounds to the nearest; awq and gptq take the inputs of --calibrate into account."""
    calibrate: tuple[str, ...] = ()
    """Tasks or mixtures whose training examples awq and gptq read."""
    num_calibration: int = 128
    """Number of those examples."""
    tasks: tuple[str, ...] = ()
    """Tasks on which to compare it with the uncompressed model."""
    split: str = "validation"
    """Split to compare on."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py, the shipped ones and the
    run's."""
    num_examples: int | None = None
    """Maximum number of examples of each task, drawn from all of them. None: all."""
    inputs_length: int | None = None
    """Maximum length of inputs in tokens, of --tasks and --calibrate; longer ones are truncated.
    None: as in the run, or 512."""
    max_tokens: int | None = None
    """Maximum length of targets and answers in tokens, likewise. None: as in the run, or 128."""


_REPORT = ("tasks", "split", "task_files", "num_examples", "inputs_length", "max_tokens")


def compress(args: list[str]) -> None:
    options = parse(Compress, model_first(args), prog="t5jax compress", positional=True)
    check_used(options, "tasks", "split", "num_examples")
    check_used(options, "calibrate", "num_calibration")
    if not options.calibrate:
        check_used(options, "tasks", "inputs_length", "max_tokens")
    check_options(options, 1, "num_calibration", "num_examples", "inputs_length", "max_tokens")
    from t5jax import tradeoff
    from t5jax.compilation import keep_programs
    from t5jax.quantize.compress import compress_model
    from t5jax.quantize.matrices import Scheme
    from t5jax.source import find

    keep_programs()
    source = find(options.model, base=options.base)
    report = {n: getattr(options, n) for n in _REPORT}
    tradeoff.check(source, **report)
    compress_model(
        source,
        options.output,
        Scheme(options.weights, options.activations, options.group, options.keep),
        kv_cache=options.kv_cache,
        method=options.method,
        calibrate=options.calibrate,
        num_calibration=options.num_calibration,
        inputs_length=options.inputs_length,
        targets_length=options.max_tokens,
        task_files=options.task_files,
    )
    found = tradeoff.measure(options.model, options.output, base=options.base, **report)
    for line in found.lines():
        print(line)
    print(f"wrote {options.output}", file=sys.stderr)
