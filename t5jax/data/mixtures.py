"""Mixtures of tasks, with given rates, equal rates, or rates by the tasks' sizes.

    mixture("calendar", {"weekdays": 3, "weekdays:ask:5shot": 1})
    mixture("everything", ["gsm8k", "scitldr"], rates="proportional", cap=2**19, temperature=2)

Proportional rates follow Raffel et al. 2020 (arXiv:1910.10683), section 3.5.2: a task with n rows
has the rate min(n, cap)^(1/temperature). A cap keeps a huge task from dominating
("examples-proportional mixing" with an artificial limit K); a temperature above 1 makes the rates
more equal ("temperature-scaled mixing").
"""

import dataclasses
import json
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from t5jax.checks import check_choice
from t5jax.data.bridge.tf import seqio
from t5jax.data.fingerprint import digest
from t5jax.data.run import TRAIN_SPLIT
from t5jax.data.stamps import stamp_files
from t5jax.data.tasks.base import OwnSource, check_new
from t5jax.data.tasks.foreign import kind_of
from t5jax.data.tasks.prompted import register_variant
from t5jax.storage import cache_dir, write_file

Rates = Literal["equal", "proportional"]


def mixture(
    name: str,
    tasks: Mapping[str, float] | Sequence[str],
    *,
    rates: Rates | None = None,
    cap: int | None = None,
    temperature: float | None = None,
) -> seqio.Mixture:
    """Registers a SeqIO mixture.

    Its tasks may be registered later, by another file: they are looked up, and their rows counted,
    when the mixture is first read.

    Args:
      name: the name of the mixture in configs.
      tasks: names of tasks, variants of prompted tasks, or mixtures: a dict of relative rates, or a
        list.
      rates: for a list: "equal" (the default), or "proportional" to the number of rows of the split
        "train" after cleaning.
      cap: the maximum number of rows that a task counts for, with "proportional". None: no limit.
      temperature: with "proportional"; None: 1.
    Returns:
      The mixture, which is now in `seqio.MixtureRegistry`.
    Raises:
      ValueError: if the name is taken, there are no tasks, a task occurs twice, or a rate, cap or
        temperature is not greater than 0. When it is read, if a task does not exist.
    """
    check_new(name)
    if isinstance(tasks, str) or not tasks:
        raise ValueError(
            f"mixture {name!r} is of {tasks!r}; expected tasks, such as "
            '{"gsm8k": 2, "scitldr": 1} or ["gsm8k", "scitldr"]'
        )
    try:
        chosen = _rates(tasks, rates, cap, temperature)
    except ValueError as error:
        raise ValueError(f"mixture {name!r}: {error}") from None
    made = _Mixture(name, chosen)
    seqio.MixtureRegistry.add_provider(name, made)
    return made


def _rates(tasks, rates: Rates | None, cap, temperature) -> dict:
    if isinstance(tasks, Mapping):
        if rates is not None:
            raise ValueError(f"rates is {rates!r}, but the tasks come with rates; leave one out")
        for task, rate in tasks.items():
            _check_positive(rate, f"the rate of {task!r}", "leave a task out that is not wanted")
        chosen = dict(tasks)
    else:
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"a task is there twice in {', '.join(tasks)}")
        check_choice(rates or "equal", get_args(Rates), "rates")
        chosen = dict.fromkeys(tasks, 1.0)
    if rates != "proportional":
        for what, value in {"cap": cap, "temperature": temperature}.items():
            if value is not None:
                raise ValueError(
                    f'{what} is {value}, which only rates="proportional" of a list of tasks uses'
                )
        return chosen
    for what, value in {"cap": cap, "temperature": temperature}.items():
        if value is not None:
            _check_positive(value, what, "None leaves it out")
    return dict.fromkeys(tasks, _Proportional(cap or math.inf, temperature or 1.0))


def _check_positive(value, what: str, remedy: str) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{what} is {value!r}; expected a number above 0 ({remedy})")


@dataclasses.dataclass(frozen=True)
class _Proportional:
    """A rate as a function of the task, which SeqIO calls."""

    cap: float
    temperature: float

    def __call__(self, task: seqio.Task) -> float:
        return min(num_rows(task), self.cap) ** (1 / self.temperature)


class _Mixture(seqio.Mixture):
    """A mixture that looks its tasks up when it is asked for them first."""

    def __init__(self, name: str, rates: Mapping):
        self._name, self._rates = name, rates

    def __getattr__(self, attribute: str):
        # Of all that SeqIO's constructor sets, only the name is there before.
        if attribute not in ("_tasks", "_sub_mixtures", "_task_map", "_task_to_rate", "_sample_fn"):
            raise AttributeError(attribute)
        self._look_up()
        return getattr(self, attribute)

    def _look_up(self) -> None:
        for name in self._rates:
            register_variant(name)
            is_mixture = name in seqio.MixtureRegistry.names()
            if not is_mixture and name not in seqio.TaskRegistry.names():
                known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
                raise ValueError(
                    f"mixture {self.name!r}: there is no task {name!r}; known are "
                    f"{', '.join(known)}"
                )
            if is_mixture and isinstance(self._rates[name], _Proportional):
                raise ValueError(
                    f"mixture {self.name!r}: {name!r} is a mixture, which has no size of its own; "
                    "name its tasks, or give rates"
                )
        super().__init__(self._name, list(self._rates.items()))


# --- Sizes --------------------------------------------------------------------------------------

_counts: weakref.WeakKeyDictionary[seqio.Task, dict[str, int]] = weakref.WeakKeyDictionary()


def num_rows(task: seqio.Task, split: str = TRAIN_SPLIT) -> int:
    """Returns how many rows a split of a task has after cleaning, before templates.

    They are counted by reading them, once: where they come from files, the count is kept in
    `t5jax.storage.cache_dir()` until a file or the code of the source changes.

    Raises:
      ValueError: for a split that the task does not have, or rows that cannot be read.
    """
    known = _counts.setdefault(task, {})
    if split not in known:
        if split not in task.splits:
            raise ValueError(
                f"task {task.name!r} has no split {split!r} to count; there are "
                f"{', '.join(task.splits)}"
            )
        known[split] = _count(task, split)
    return known[split]


def _count(task: seqio.Task, split: str) -> int:
    kind = kind_of(task)
    if not isinstance(kind, OwnSource) or not (files := kind.files(split)):
        return kind.num_rows(split)
    contents = [stamp.get("sha256") or stamp["key"] for stamp in stamp_files(files)]
    path = cache_dir() / "counts" / f"{digest([kind.source, split, contents])}.json"
    if not path.is_file():
        write_file(path, json.dumps(kind.num_rows(split)).encode())
    return json.loads(path.read_bytes())
