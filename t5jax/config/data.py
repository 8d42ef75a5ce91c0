"""What a run begins with, and the data it reads."""

import dataclasses

from t5jax.checks import check_at_least


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Initial parameters."""

    model: str = ""
    """A Hugging Face Hub name or folder, a run, or one checkpoint of a run. Empty: random
    parameters. The architecture must match `model`."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data and the shape of a batch."""

    mixture: str = ""
    """SeqIO task or mixture to train on."""
    mixture_changes: tuple[str, ...] = ()
    """Tasks or mixtures to switch to at a step, as STEP:NAME, such as 1000:harder_mixture.
    `mixture` is used until the first of these steps."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py and the shipped ones."""
    vocabulary: str = ""
    """"bytes", a SentencePiece .model file, a tokenizer.json, GPT-2's vocab.json or BERT's
    vocab.txt, or a folder or Hub name with a tokenizer. Empty: the tokenizer of init.model, or
    otherwise the task's own."""
    cache: str | None = None
    """Folder of caches of tokenized examples, which are fully shuffled; a cache that is missing or
    does not match its task is written first (or beforehand by `t5jax cache`). None: stream."""
    inputs_length: int = 512
    """Length of encoder rows in tokens; longer inputs are truncated."""
    targets_length: int = 128
    """Length of decoder rows in tokens; longer targets are truncated."""
    batch_size: int = 128
    """Rows per step, over all devices and hosts."""
    pack: bool = False
    """Pack several short examples into one row, separated by segment ids."""
    prefix_lm: bool = False
    """Decoder-only models: attention among the inputs is bidirectional, as in T5's prefix language
    model, instead of causal."""
    seed: int = 0
    """Seed of the order of the examples."""

    def __post_init__(self) -> None:
        for name in ("inputs_length", "targets_length", "batch_size"):
            check_at_least(getattr(self, name), 1, f"data.{name}")
        if self.cache == "":
            raise ValueError(
                "data.cache is ''; expected a folder, or None to stream without a cache"
            )
        _ = self.mixtures  # Checks them.

    @property
    def mixtures(self) -> tuple[tuple[int, str], ...]:
        """The first step and the name of every mixture, in order: ((0, "easy"), (1000, "hard")).

        Raises:
          ValueError: if a change cannot be parsed, or the steps do not increase.
        """
        mixtures = [(0, self.mixture)]
        for change in self.mixture_changes:
            step, colon, name = change.partition(":")
            if not (step.isascii() and step.isdecimal() and colon and name):
                raise ValueError(
                    f"data.mixture_changes has {change!r}; expected STEP:NAME, such as "
                    "1000:other_mixture"
                )
            if int(step) <= mixtures[-1][0]:
                raise ValueError(
                    f"data.mixture_changes has {change!r} after step {mixtures[-1][0]}; the steps "
                    "must increase, starting from 1 or more"
                )
            mixtures.append((int(step), name))
        return tuple(mixtures)
