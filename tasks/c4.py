"""C4, the English web text that T5 was pre-trained on (Raffel et al. 2020, arXiv:1910.10683).

It is read from the Hub as a stream, 305 GB compressed, of which nothing is kept on the disk. A run
that goes on reads up to its place in the stream again; with a cache (`t5jax cache`) it is there at
once, and all of the text is shuffled.

    c4        span corruption (T5)
    c4_ul2    a mixture of denoisers (UL2)
    c4_lm     causal language modelling
"""

from t5jax.data import CausalLM, SpanCorruption, hf_dataset, text_task, ul2

SPLITS = {"train": "train", "validation": "validation"}
SOURCE = hf_dataset("allenai/c4", SPLITS, "en", streaming=True)

for name, objective in {"c4": SpanCorruption(), "c4_ul2": ul2(), "c4_lm": CausalLM()}.items():
    text_task(name, SOURCE, objective, vocabulary="google/t5-v1_1-base")
