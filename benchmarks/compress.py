"""Size and speed of quantized T5 1.1 small, compared with CTranslate2's int8 in one run.

Greedy generation, 64 input and 64 output tokens, random weights; no row ends early. Sizes are those
of the weights on disk, speeds are medians. Needs the extras `torch` and `compress`.

    python benchmarks/compress.py [--batch-sizes 1 32] [--repeats 3]
"""

import argparse
import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from generate import NEW_TOKENS, SOURCE, _check, ctranslate2_generate
from t5jax import batch as features
from t5jax.architectures import T5Config, published
from t5jax.decoding import greedy
from t5jax.hf import ctranslate2, io
from t5jax.host_memory import keep_freed_memory
from t5jax.models import api
from t5jax.quantize.compress import compress_model
from t5jax.quantize.matrices import Scheme
from t5jax.source import Source, find
from t5jax.tokenizers import ByteTokenizer
from turns import median_seconds

SCHEMES = {
    "float32": None,
    "int8": Scheme("int8"),
    "int8, int8 activations": Scheme("int8", activations="int8"),
    "fp8": Scheme("fp8"),
    "int4": Scheme("int4"),
    "nf4": Scheme("nf4"),
}


def write(folder: Path) -> dict[str, Source]:
    """Returns the model under each scheme."""
    model = published("t5_1_1_small", scan_layers=False)
    params = jax.jit(lambda key: api.init_params(model, key))(jax.random.key(0))
    io.save_params(folder / "float32", model, params, tokenizer=ByteTokenizer())
    for name, scheme in SCHEMES.items():
        if scheme:
            compress_model(str(folder / "float32"), str(folder / name), scheme)
    return {name: find(str(folder / name)) for name in SCHEMES}


def size(folder: Path) -> int:
    """Returns the bytes of the weights in a folder."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("model.bin")]
    return sum(path.stat().st_size for path in weights)


def t5jax_generate(source: Source, tokens: np.ndarray):
    """Returns a function that generates and waits."""
    keep_freed_memory()
    model, params = source.read()
    last = model.vocab_size - 1  # Padding, which random weights are as unlikely to choose as any.
    model = dataclasses.replace(model, eos_token_id=last, scan_layers=False)
    params = jax.jit(lambda params: api.arrange_for_decoding(model, params))(params)
    batch = {features.ENCODER_INPUT_TOKENS: tokens}
    return lambda: _check(model, tokens, np.asarray(greedy(model, params, batch, NEW_TOKENS)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    args = parser.parse_args()

    model: T5Config = published("t5_1_1_small", scan_layers=False)
    table = Table(title=f"T5 1.1 small, greedy, {SOURCE} -> {NEW_TOKENS} tokens")
    for column in ("", "MB", *(f"tokens/s, batch {n}" for n in args.batch_sizes)):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as made:
        sources = write(Path(made))
        ctranslate2.convert(Path(made, "float32"), Path(made, "ct2"), "int8")
        sizes = {name: size(source.path) for name, source in sources.items()}
        sizes["CTranslate2, int8"] = size(Path(made, "ct2"))
        rates: dict[str, list[float]] = {name: [] for name in sizes}
        for batch_size in args.batch_sizes:
            shape = (batch_size, SOURCE)
            tokens = np.random.default_rng(0).integers(2, 384, shape, np.int32)
            contestants = {
                name: functools.partial(t5jax_generate, source, tokens)
                for name, source in sources.items()
            }
            contestants["CTranslate2, int8"] = functools.partial(
                ctranslate2_generate, model, tokens, compute_type="int8"
            )
            for name, seconds in median_seconds(contestants, args.repeats).items():
                rates[name].append(batch_size * NEW_TOKENS / seconds)
    for name, count in sizes.items():
        share = f"{count / 1e6:,.1f} ({count / sizes['float32']:.1%})"
        table.add_row(name, share, *(f"{rate:,.0f}" for rate in rates[name]))
    Console().print(table)


if __name__ == "__main__":
    main()
