"""Greedy generation with T5 1.1 small, compared with transformers and CTranslate2 in one run.

64 input and 64 output tokens, random weights; no row ends early. The table shows medians. Needs the
`torch` extra.

    python benchmarks/generate.py [--batch-sizes 1 8 32] [--repeats 5] [--dtype bfloat16]
"""

import argparse
import dataclasses
import functools
import os
import tempfile

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from t5jax import batch as features
from t5jax.architectures import T5Config, published
from t5jax.decoding import greedy
from t5jax.hf import io
from t5jax.hf.t5 import write_config
from t5jax.host_memory import keep_freed_memory
from t5jax.models import api
from turns import median_seconds

SOURCE = NEW_TOKENS = 64


def t5jax_generate(model: T5Config, tokens: np.ndarray):
    """Returns a function that generates and waits."""
    keep_freed_memory()
    # Padding of the vocabulary, which random weights are as unlikely to choose as any other.
    model = dataclasses.replace(model, eos_token_id=model.vocab_size - 1)
    params = jax.jit(lambda key: api.init_params(model, key))(jax.random.key(0))
    params = jax.jit(lambda params: api.arrange_for_decoding(model, params))(params)
    batch = {features.ENCODER_INPUT_TOKENS: tokens}
    return lambda: _check(model, tokens, np.asarray(greedy(model, params, batch, NEW_TOKENS)))


def torch_generate(model: T5Config, tokens: np.ndarray):
    import torch
    from transformers import T5Config as HFConfig
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    config = HFConfig(**write_config(model))
    network = T5ForConditionalGeneration(config).to(getattr(torch, model.dtype)).eval()
    inputs = torch.tensor(tokens).long()
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}

    def run():
        with torch.inference_mode():
            out = network.generate(input_ids=inputs, **options).numpy()[:, 1:]
        _check(model, tokens, out)

    return run


def ctranslate2_generate(model: T5Config, tokens: np.ndarray, compute_type: str):
    import ctranslate2
    import tokenizers
    import transformers

    params = jax.jit(lambda key: api.init_params(model, key))(jax.random.key(0))
    words = {f"t{i}": i for i in range(model.vocab_size)}
    with tempfile.TemporaryDirectory() as folder:
        io.save_params(folder, model, params)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "t2")),
            pad_token=f"t{model.pad_token_id}",
            eos_token=f"t{model.eos_token_id}",
            unk_token="t2",
        ).save_pretrained(folder)
        converter = ctranslate2.converters.TransformersConverter(folder)
        converted = converter.convert(os.path.join(folder, "ctranslate2"))
        translator = ctranslate2.Translator(
            converted, compute_type=compute_type, intra_threads=os.cpu_count()
        )
    sources = [[f"t{i}" for i in row] for row in tokens.tolist()]

    def run():
        results = translator.translate_batch(
            sources,
            beam_size=1,
            max_batch_size=len(sources),
            min_decoding_length=NEW_TOKENS,
            max_decoding_length=NEW_TOKENS,
        )
        out = [[int(token[1:]) for token in result.hypotheses[0]] for result in results]
        _check(model, tokens, np.array(out))

    return run


def _check(model: T5Config, tokens: np.ndarray, out: np.ndarray):
    if out.shape != (len(tokens), NEW_TOKENS) or (out == model.vocab_size - 1).any():
        raise RuntimeError("a row ended early: the two did not do the same work")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()

    model = published("t5_1_1_small", dtype=args.dtype, scan_layers=False)
    title = f"T5 1.1 small, greedy, {SOURCE} -> {NEW_TOKENS} tokens, {args.dtype}: tokens/s"
    peers = {
        "transformers": torch_generate,
        "CTranslate2, float32": functools.partial(ctranslate2_generate, compute_type="float32"),
        "CTranslate2, int8": functools.partial(ctranslate2_generate, compute_type="int8"),
    }
    table = Table(title=title)
    for column in ("batch", "t5jax", *(f"{peer} (times)" for peer in peers)):
        table.add_column(column, justify="right")
    for batch_size in args.batch_sizes:
        shape = (batch_size, SOURCE)
        tokens = np.random.default_rng(0).integers(2, model.vocab_size, shape, np.int32)
        contestants = {
            f"{name}, batch {batch_size}": functools.partial(build, model, tokens)
            for name, build in {"t5jax": t5jax_generate, **peers}.items()
        }
        seconds = median_seconds(contestants, args.repeats).values()
        ours, *theirs = (batch_size * NEW_TOKENS / median for median in seconds)
        compared = (f"{rate:,.0f} ({ours / rate:.2f}x)" for rate in theirs)
        table.add_row(str(batch_size), f"{ours:,.0f}", *compared)
    Console().print(table)


if __name__ == "__main__":
    main()
