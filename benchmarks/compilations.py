"""Compilations while prompts of random lengths are answered: none after a prompt of each bucket.

A tiny T5 with random weights answers 500 prompts of 1 to 120 tokens, greedily and by drawing.

    python benchmarks/compilations.py [--prompts 500] [--batch-size 8]
"""

import argparse
import logging

import jax
import numpy as np

from t5jax import sharding
from t5jax.architectures import T5Config
from t5jax.decoding import GenerationOptions, Generator
from t5jax.models import api
from t5jax.tokenizers import ByteTokenizer


class Compilations(logging.Handler):
    """Counts what jax says that it compiles."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def emit(self, record):
        self.count += record.getMessage().startswith("Compiling")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()

    model = T5Config(
        vocab_size=384,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_heads=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        scan_layers=False,
    )
    params = api.arrange_for_decoding(model, api.init_params(model, jax.random.key(0)))
    generate = Generator(model, ByteTokenizer(), sharding.make_mesh())
    compilations, size = Compilations(), args.batch_size
    logging.getLogger("jax").addHandler(compilations)
    logging.getLogger("jax").propagate = False
    lengths = np.random.default_rng(0).integers(1, 121, args.prompts).tolist()
    prompts = [[*np.random.default_rng(n).integers(3, 250, n).tolist(), 1] for n in lengths]
    with jax.log_compiles():
        for options in (
            GenerationOptions(max_tokens=16),
            GenerationOptions(max_tokens=16, temperature=0.8, top_p=0.9),
        ):
            how = "drawn" if options.temperature else "greedy"
            for warm_up in ([[70] * n for n in (15, 31, 63, 127)], prompts):
                compilations.count = 0
                for first in range(0, len(warm_up), size if warm_up is prompts else 1):
                    chunk = warm_up[first : first + (size if warm_up is prompts else 1)]
                    generate.answers(params, chunk, options, batch_size=size, rows=size)
                what = f"{len(warm_up)} prompts" if warm_up is prompts else "warm-up"
                print(f"{how}, {what}: {compilations.count} programs compiled")


if __name__ == "__main__":
    main()
