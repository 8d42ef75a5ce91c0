"""Input throughput with packing: t5jax, streamed and cached, compared with SeqIO in one run.

Both read the same rows (GSM8K's questions and SciTLDR's abstracts with their answers) from one TSV
file, with the same vocabulary and lengths. SeqIO uses TensorFlow operations and its own shuffling,
converter and packing; then its own cache of tokenized TFRecords. The contestants alternate, on one
core and on two; the table shows medians, in tokens without padding per second.

    T5JAX_DATA=data/tasks python benchmarks/data.py --vocabulary data/vocab/t5_spiece.model
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = {
    "gsm8k.train.jsonl": lambda row: (row["question"], row["answer"]),
    "SciTLDR-A.train.jsonl": lambda row: (" ".join(row["source"]), row["target"][0]),
}
SEQIO, SEQIO_CACHED, STREAMED, CACHED = CONTESTANTS = (
    "SeqIO, streaming",
    "SeqIO, its cache",
    "t5jax, streaming",
    "t5jax, cache",
)
# nanoT5's README: T5-base, 128 x (512 -> 114), bfloat16, torch.compile, one A100.
STEP_SECONDS = 0.56


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", required=True, help="a SentencePiece model")
    parser.add_argument("--data", type=Path, help="folder of the rows; default: $T5JAX_DATA")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument(
        "--copies",
        type=int,
        default=1,
        help="of the rows; from 2 on, there are too many for t5jax to keep in memory",
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--inputs-length", type=int, default=512)
    parser.add_argument("--targets-length", type=int, default=128)
    parser.add_argument(
        "--step-seconds",
        type=float,
        help=f"of one T5-base step; default: {STEP_SECONDS}, published by nanoT5 for an A100",
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # Folder of the data, in a child.
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    args.data = args.data or Path(os.environ.get("T5JAX_DATA", "data"))
    with tempfile.TemporaryDirectory() as folder:
        write_rows(args.data, Path(folder) / "rows.tsv", args.copies)
        results = {cores: run_on(cores, folder) for cores in args.cores}
    show(results, args)


def write_rows(data: Path, output: Path, num_copies: int) -> None:
    lines = []
    for name, texts in ROWS.items():
        for line in (data / name).read_text(encoding="utf-8").rstrip("\n").split("\n"):
            lines.append("\t".join(" ".join(text.split()) for text in texts(json.loads(line))))
    output.write_text("\n".join(lines * num_copies) + "\n", encoding="utf-8")


def run_on(cores: int, folder: str) -> dict:
    """Measures in a separate process, which is restricted to these cores from its start."""
    available = sorted(os.sched_getaffinity(0))
    if cores > len(available):
        raise SystemExit(f"there are {len(available)} cores; --cores has {cores}")
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", folder]
    pin = functools.partial(os.sched_setaffinity, 0, available[:cores])
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, preexec_fn=pin)
    return json.loads(done.stdout.splitlines()[-1])


# --- In the child -------------------------------------------------------------------------------


def measure(args) -> dict:
    """Returns each contestant's tokens per second and the fill of each side, one value per turn."""
    contestants = make_contestants(args, Path(args.measure))
    results = {name: [] for name in contestants}
    for _ in range(args.repeats):
        for name, make in contestants.items():
            results[name].append(time_batches(make(), args))
            print(f"{name}: {results[name][-1][0]:,.0f} tokens/s", file=sys.stderr)
    return results


def time_batches(batches, args) -> tuple[float, float, float]:
    import numpy as np

    for _ in range(2):  # Opens files, traces, fills buffers.
        next(batches)
    num_batches, tokens, start = 0, [0, 0], time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        batch = next(batches)
        for side, feature in enumerate(("encoder_input_tokens", "decoder_target_tokens")):
            tokens[side] += np.count_nonzero(batch[feature])
        num_batches += 1
    seconds = time.perf_counter() - start
    rows = num_batches * args.batch_size
    return sum(tokens) / seconds, *(
        count / (rows * length)
        for count, length in zip(tokens, (args.inputs_length, args.targets_length), strict=True)
    )


def make_contestants(args, folder: Path) -> dict:
    from t5jax.architectures import T5Config
    from t5jax.config import Config, DataConfig
    from t5jax.data import pipeline
    from t5jax.data.bridge.tf import seqio, tf
    from t5jax.data.sources.kinds import tsv
    from t5jax.data.tasks.prompted import prompted_task

    lengths = {"inputs": args.inputs_length, "targets": args.targets_length}
    rows = str(folder / "rows.tsv")

    # --- SeqIO's
    @seqio.map_over_dataset
    def split_line(line):
        inputs, targets = tf.unstack(tf.strings.split(line, "\t"), num=2)
        return {"inputs": inputs, "targets": targets}

    feature = seqio.Feature(seqio.SentencePieceVocabulary(args.vocabulary), add_eos=True)
    task = seqio.TaskRegistry.add(
        "benchmark_seqio",
        source=seqio.TextLineDataSource({"train": rows}),
        preprocessors=[
            split_line,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={"inputs": feature, "targets": feature},
    )

    def seqio_batches(use_cached):
        dataset = seqio.get_dataset(
            task.name,
            lengths,
            seqio.EncDecFeatureConverter(pack=True),
            dataset_split="train",
            use_cached=use_cached,
            num_epochs=None,
            seed=0,
            batch_size=args.batch_size,
            verbose=False,
        )
        return dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()

    write_seqio_cache(task, folder / "seqio_cache")
    seqio.add_global_cache_dirs([str(folder / "seqio_cache")])

    # --- t5jax's
    prompted_task(
        "benchmark_t5jax",
        tsv({"train": rows}, columns=["inputs", "targets"]),
        [("{inputs}", "{targets}")],
        metrics=[],
        vocabulary=args.vocabulary,
    )

    def t5jax_batches(cache):
        data = DataConfig(
            mixture="benchmark_t5jax",
            inputs_length=args.inputs_length,
            targets_length=args.targets_length,
            batch_size=args.batch_size,
            pack=True,
            cache=cache,
        )
        return pipeline.train_iterator(Config(model=T5Config(vocab_size=32128), data=data))

    return {
        SEQIO: lambda: seqio_batches(False),
        SEQIO_CACHED: lambda: seqio_batches(True),
        STREAMED: lambda: t5jax_batches(None),
        CACHED: lambda: t5jax_batches(str(folder / "cache")),
    }


def write_seqio_cache(task, folder: Path, num_shards: int = 8) -> None:
    """Writes the same as SeqIO's cache_tasks, which needs Beam."""
    from t5jax.data.bridge.tf import tf

    folder = folder / task.name
    if folder.exists():  # By the child before this one.
        return
    folder.mkdir(parents=True)
    dataset = task.preprocess_precache(task.source.get_dataset("train", shuffle=False))
    prefix = str(folder / "train.tfrecord-{:05d}-of-{:05d}")
    writers = [tf.io.TFRecordWriter(prefix.format(i, num_shards)) for i in range(num_shards)]
    features = list(task.output_features)
    num_examples = 0
    for num_examples, row in enumerate(dataset.as_numpy_iterator(), start=1):
        example = tf.train.Example()
        for name in features:
            example.features.feature[name].int64_list.value.extend(row[name].tolist())
        writers[num_examples % num_shards].write(example.SerializeToString())
    for writer in writers:
        writer.close()
    info = {
        "num_shards": num_shards,
        "features": {name: {"shape": [None], "dtype": "int32"} for name in features},
        "seqio_version": "0.0.20",
    }
    (folder / "info.train.json").write_text(json.dumps(info))
    (folder / "stats.train.json").write_text(json.dumps({"examples": num_examples}))
    (folder / "COMPLETED").write_text("")


# --- The table ----------------------------------------------------------------------------------


def show(results: dict[int, dict], args) -> None:
    from rich.console import Console
    from rich.table import Table

    title = (
        f"Packed batches of {args.batch_size} x ({args.inputs_length} + {args.targets_length}), "
        f"medians of {args.repeats}"
    )
    table = Table(title=title)
    columns = ("cores", "", "tokens/s", "times SeqIO", "times its cache", "full", "of a step")
    for column in columns:
        table.add_column(column, justify="left" if column == "" else "right")
    step = args.step_seconds or STEP_SECONDS
    for cores, found in results.items():
        rates = {name: statistics.median(turn[0] for turn in found[name]) for name in CONTESTANTS}
        for name, rate in rates.items():
            fill = [statistics.median(turn[i] for turn in found[name]) for i in (1, 2)]
            held = args.inputs_length * fill[0] + args.targets_length * fill[1]
            table.add_row(
                str(cores) if name == SEQIO else "",
                name,
                f"{rate:,.0f}",
                f"{rate / rates[SEQIO]:.2f}x",
                f"{rate / rates[SEQIO_CACHED]:.2f}x",
                f"{max(fill):.1%}",
                f"{args.batch_size * held / rate / step:.0%}",
            )
        table.add_section()
    Console().print(table)
    source = "as given" if args.step_seconds else "published by nanoT5 for T5-base on an A100"
    print(
        f"full: of the fuller side. of a step: time of one batch in parts of {step:g} s, {source}; "
        "below 100 % the input keeps up."
    )


if __name__ == "__main__":
    main()
