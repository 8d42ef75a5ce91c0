"""`t5jax cache`: writes caches of tokenized examples."""

import dataclasses
import sys

from t5jax.commands.parse import check_options, parse


@dataclasses.dataclass(frozen=True)
class Cache:
    """Tokenizes the tasks of a mixture and writes caches, unless there are caches that match.

    A run reads them with --data.cache FOLDER and the same mixture, vocabulary and lengths.
    A cache that was written with other rows, templates or another vocabulary is rewritten.
    """

    mixture: str
    """Task, variant or mixture."""
    folder: str
    """Folder of caches."""
    vocabulary: str = ""
    """data.vocabulary of the runs. Empty: the tasks' own."""
    inputs_length: int = 512
    """data.inputs_length of the runs."""
    targets_length: int = 128
    """data.targets_length of the runs."""
    splits: tuple[str, ...] = ("train",)
    """Splits to write."""
    processes: int | None = None
    """Number of processes that tokenize. None: one per core."""
    num_shards: int = 8
    """Number of files of a cache."""
    rebuild: bool = False
    """Also rewrite caches that match."""
    beam: tuple[str, ...] | None = None
    """Run on Apache Beam with these options, such as runner=FlinkRunner (needs the extra `beam`).
    The workers write into FOLDER: in a bucket, or one that all of them have."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py and the shipped ones."""


def cache(args: list[str]) -> None:
    """Writes caches; reports which ones already matched, and what was dropped."""
    options = parse(Cache, args, prog="t5jax cache", positional=True)
    check_options(options, 1, "inputs_length", "targets_length")
    if options.beam is not None and options.processes is not None:
        raise ValueError("--processes is for this machine, and --beam for a cluster; leave one out")
    from t5jax.data.cache.store import write_caches
    from t5jax.data.registry import load_tasks
    from t5jax.data.run import Run
    from t5jax.data.texts import common_tokenizer
    from t5jax.tokenizers import load_tokenizer

    load_tasks(options.task_files)
    vocabulary = load_tokenizer(options.vocabulary) if options.vocabulary else None
    write = None
    if options.beam is not None:
        from t5jax.data.cache.beam import make_writer

        write = make_writer([f"--{option}" for option in options.beam], options.task_files)
    lengths = {"inputs": options.inputs_length, "targets": options.targets_length}
    reports = write_caches(
        options.mixture,
        options.folder,
        Run(common_tokenizer(options.mixture, vocabulary), lengths=lengths),
        splits=options.splits,
        processes=options.processes,
        num_shards=options.num_shards,
        rebuild=options.rebuild,
        write=write,
    )
    for report in reports:
        if not report.reason:
            print(f"kept {report.path}: {report.num_examples:,} examples", file=sys.stderr)
        for name, number in report.dropped.items():
            if number:
                print(f"  {number:,} dropped by {name}", file=sys.stderr)
