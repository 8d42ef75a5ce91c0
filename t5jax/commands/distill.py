"""`t5jax distill`: a teacher's answers as a task for a student."""

import contextlib
import dataclasses
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from t5jax import storage
from t5jax.commands.parse import check_options, fields, model_first, parse
from t5jax.config import MeshConfig


@dataclasses.dataclass(frozen=True)
class Distill:
    """Writes the answers of a model to a task's prompts as a task to train a student on.

    This is sequence-level distillation (arXiv:1606.07947). FOLDER/NAME.py registers the task NAME;
    its training split has the answers, its other splits have the targets of the original. The same
    command goes on where it was stopped. To learn a teacher's probabilities instead, train with
    --distill.teacher.
    """

    model: str
    """The teacher: Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint."""
    task: str
    """Task, variant or mixture whose training prompts are answered."""
    base: str = ""
    """Of an adapter: where its base is now. Empty: where the adapter says."""
    name: str = ""
    """Name of the new task. Empty: TASK_distilled."""
    folder: Path = Path("tasks")
    """Folder for the task file and its JSON lines; tasks of ./tasks are found by themselves."""
    num_examples: int | None = None
    """Maximum number of training prompts of each task, drawn from all of them. None: all."""
    max_tokens: int | None = None
    """Maximum length of an answer in tokens. None: as generation_config.json says, or 64."""
    num_beams: int | None = None
    """Beam search with this many beams; 1: none."""
    temperature: float | None = None
    """Draw answers from probabilities**(1 / temperature); 0: the most probable token."""
    seed: int = 0
    """What drawn tokens depend on."""
    batch_size: int = 64
    """Prompts per batch."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py and the shipped ones."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of computation and parameters. None: as in training."""
    mesh: MeshConfig = MeshConfig()
    """Devices to use."""


_GENERATION = ("max_tokens", "num_beams", "temperature", "seed")
# Batches between two writes.
_BATCHES = 16

_TASK_FILE = '''\
"""The answers of {model}
to the prompts of the task {task}, as `t5jax distill` wrote them.

The other splits have the targets of {task}.
"""

from pathlib import Path

from t5jax.data import exact_match, jsonl, prompted_task

HERE = Path(__file__).parent

prompted_task(
    "{name}",
    jsonl({{split: str(HERE / f"{name}.{{split}}.jsonl") for split in {splits}}}),
    [("{{inputs}}", "{{targets}}")],
    metrics=[exact_match],
    empty="drop",
)
'''


def distill(args: list[str]) -> None:
    options = parse(Distill, model_first(args), prog="t5jax distill", positional=True)
    check_options(options, 1, "num_examples", "max_tokens", "num_beams", "batch_size")
    if storage.is_remote(storage.path(options.folder, "--folder")):
        raise ValueError(
            f"--folder is {options.folder}; the task's file reads its rows from beside it: give a "
            "folder of this machine, and copy it"
        )
    name = options.name or re.sub(r"\W", "_", options.task) + "_distilled"
    if not re.fullmatch(r"\w+", name):
        raise ValueError(
            f"--name {name!r} is no name of a task file; expected letters, digits and underscores"
        )
    from t5jax.bulk.output import AnswersFile
    from t5jax.compilation import keep_programs
    from t5jax.data.registry import files_of, load_tasks
    from t5jax.monitor.progress import counting
    from t5jax.pretrained import load
    from t5jax.source import find

    keep_programs()
    source = find(options.model, base=options.base)  # Its name, before tasks are read.
    task_files = (*source.config.data.task_files, *options.task_files)
    load_tasks(task_files)
    place = options.folder / f"{name}.py"
    if others := [file for file in files_of(name, task_files) if file != place.resolve()]:
        raise ValueError(
            f"{others[0]} has a task {name!r} already, on which a student would be trained; give "
            "another --name"
        )
    model = load(options.model, dtype=options.dtype, mesh=options.mesh, base=options.base)
    model.check_writes()
    how = model.options(
        **{n: getattr(options, n) for n in _GENERATION if getattr(options, n) is not None}
    )
    splits = _splits(options.task)
    rows = _rows(options.task, "train", model, options.num_examples)
    path = options.folder / f"{name}.train.jsonl"
    where = ("batch_size", "mesh", "folder", "base")
    asked = {n: x for n, x in fields(options).items() if n not in where}
    asked["model_files"] = [list(storage.files(place).items()) for place in source.places]
    with contextlib.ExitStack() as stack:
        options.folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(AnswersFile(path, asked))
        number = done = file.num_prompts
        num_cut = 0
        _check_answered(path, done, rows)
        bar = stack.enter_context(counting("prompts", options.num_examples, done))
        while window := list(itertools.islice(rows, _BATCHES * options.batch_size)):
            prompts = [row["inputs"] for row in window]
            answers = model.answers(prompts, how, batch_size=options.batch_size, first=number)
            lines = [
                storage.to_json({"inputs": prompt, "targets": own[0].text})
                for prompt, own in zip(prompts, answers, strict=True)
            ]
            file.write(lines, len(lines))
            num_cut += sum(own[0].finish == "length" for own in answers)
            number += len(lines)
            bar(number)
    for split in splits[1:]:
        given = (storage.to_json(row) + "\n" for row in _rows(options.task, split, model, None))
        content = "".join(given).encode("utf-8", "surrogatepass")
        storage.write_file(options.folder / f"{name}.{split}.jsonl", content)
    text = _TASK_FILE.format(model=source.path, task=options.task, name=name, splits=splits)
    storage.write_file(place, text.encode())
    again = f", {done} of them before" if done else ""
    print(f"wrote {place}: {number} answers{again}", file=sys.stderr)
    if num_cut:
        print(
            f"warning: {num_cut} of {number - done} answers did not end in the tokens that they "
            "may have, and a student learns to end there; raise --max-tokens",
            file=sys.stderr,
        )
    print(name)


def _check_answered(path: Path, done: int, rows: Iterator[dict[str, str]]) -> None:
    """Reads the rows that are answered. Raises ValueError if a file has answers to others."""
    with path.open(encoding="utf-8", errors="surrogatepass", newline="\n") as lines:
        for number, line in enumerate(itertools.islice(lines, done), 1):
            was, now = json.loads(line)["inputs"], next(rows, {"inputs": None})["inputs"]
            if was != now:
                raise ValueError(
                    f"{path} was begun with other prompts: line {number} has {was!r:.80}, and the "
                    f"task has {now!r:.80} now; remove it, or give another --name"
                )


def _splits(task: str) -> list[str]:
    """Returns the splits of a task or of all of a mixture's tasks, train in front."""
    from t5jax.data.registry import check_mixture
    from t5jax.data.texts import subtasks

    tasks = subtasks([check_mixture(task, "TASK")])
    for each in tasks:
        if "inputs" not in each.output_features:
            raise ValueError(
                f"task {each.name} has targets alone, so there is no prompt to answer; choose a "
                "task with inputs"
            )
        if "train" not in each.splits:
            raise ValueError(f"task {each.name} has no split train, whose prompts are answered")
    common = set.intersection(*(set(each.splits) for each in tasks)) - {"train"}
    return ["train", *sorted(common & {"validation", "test"})]


def _rows(task: str, split: str, model: Any, most: int | None) -> Iterator[dict[str, str]]:
    from t5jax.data.registry import check_mixture
    from t5jax.data.texts import feature_tokenizers, read_examples, subtasks

    lengths = {"inputs": 512, "targets": 512}  # For exemplars, which have to fit.
    for each in subtasks([check_mixture(task, "TASK")]):
        tokenizers = dict.fromkeys(feature_tokenizers(each, model.tokenizer), model.tokenizer)
        for example in read_examples(each, split, tokenizers, lengths, Counter(), most):
            yield {name: example.texts[name] for name in ("inputs", "targets")}
