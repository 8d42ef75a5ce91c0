"""The command line: `t5jax COMMAND`. The commands themselves are in `t5jax/commands/`.

Imports are inside functions, so that help answers at once. What a user can cause ends in one
message on standard error and a non-zero exit; results alone go to standard output.
"""

import atexit
import contextlib
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from t5jax.secrets import Formatter, redact

USAGE = """\
usage: t5jax COMMAND ...

T5, GPT and BERT in JAX, from a prompted task to a trained, evaluated, exported model.

models:
  train CONFIG [--section.field VALUE ...]   train; goes on by itself where the run stopped
  sweep CONFIG --space FIELD=VALUES          train with many values of some fields; the best ones
  eval MODEL                                 a task's metrics, loss and perplexity
  infer MODEL --prompt TEXT                  answers to prompts
  embed MODEL --text TEXT                    vectors of texts, of BERT or a T5's encoder
  serve MODEL [--port PORT]                  OpenAI's interface over HTTP, and a page to try it
  export MODEL OUTPUT                        write a Hugging Face folder
  compress MODEL OUTPUT --weights int8       round its matrices to 8 or 4 bits
  import MODEL OUTPUT                        make a Hugging Face model or T5X checkpoint a run
  runs [FOLDER]                              runs with their state, step and best loss
  report RUN...                              a page of curves, samples and scores, side by side
  prune MODEL OUTPUT                         remove weights, heads or MLP columns
  trim-vocabulary MODEL OUTPUT --text FILE   keep the pieces that a task or language needs
  distill TEACHER TASK                       a teacher's answers as a task for a student
  plan CONFIG --topology v5e:2x2             memory and time of a run on a TPU, without one
  doctor                                     versions, devices, memory, folders: what is wrong

data:
  tasks list | show NAME | check NAME        what there is; what a model sees of it; is it sound
  vocab train TASK|FILES... --output FILE    learn a SentencePiece vocabulary
  cache MIXTURE FOLDER                       tokenize once, to read fast and in a global order

MODEL is a Hugging Face hub name, a Hugging Face folder, a run, or one checkpoint of a run.
CONFIG is a Python file, the name of one in ./configs or among those that come with t5jax, or a
.json file that --print-config wrote.

t5jax COMMAND --help shows every option of a command with its default.
t5jax --version shows the version.
T5JAX_TRACEBACK=1 in the environment shows where an error comes from, T5JAX_KEEP_MEMORY=0 returns
freed memory to the system after each step on a CPU, which is slower. T5JAX_KEEP_PROGRAMS=0 compiles
anew at every start of a training run.
On a TPU pod, in a SLURM step, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
set, the same command on every host is one run.
"""

START_AGAIN = 75
"""The exit status of a run that was asked to stop and has saved its step (EX_TEMPFAIL)."""

COMMANDS = {
    "train": "train.train",
    "sweep": "sweep.sweep",
    "runs": "report.runs",
    "report": "report.report",
    "plan": "plan.plan",
    "doctor": "doctor.doctor",
    "eval": "model.evaluate",
    "infer": "infer.infer",
    "embed": "model.embed",
    "serve": "serve.serve",
    "export": "model.export",
    "compress": "compress.compress",
    "import": "model.import_",
    "prune": "prune.prune",
    "distill": "distill.distill",
    "trim-vocabulary": "prune.trim_vocabulary",
    "tasks": "tasks.tasks",
    "vocab": "vocab.vocab",
    "cache": "cache.cache",
}
"""Name of a command to its function in `t5jax.commands`, from its arguments to an exit status or
None."""


_status: int | None = None
"""Of a command that is all that this process does."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    Args:
      args: its name and options. None: those of this process, which ends afterwards.
    """
    global _status
    status = _main(list(sys.argv[1:] if args is None else args))
    if args is None:
        _status = status
    return status


@atexit.register  # Early, so that it is the last one.
def _end() -> None:
    """Ends the process without Python's own clean-up, in which a thread of tf.data that waits for
    Python, and an iterator that waits for that thread, can wait for each other for ever."""
    if _status is not None:
        if (jax := sys.modules.get("jax")) and jax.distributed.is_initialized():
            jax.distributed.shutdown()  # Where jax was imported first, nothing has done it yet.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        logging.shutdown()
        os._exit(_status)


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] == "--version":
        from t5jax import __version__

        print(__version__)
        return 0
    from t5jax.commands.parse import choose

    warnings.formatwarning = _format_warning
    sys.unraisablehook = _report_unraisable
    if (handler := logging.lastResort) is not None:
        handler.setFormatter(Formatter("t5jax: %(levelname)s: %(message)s"))
        if not logging.root.handlers:  # absl would set one of its own, which hides no secrets.
            logging.root.addHandler(handler)
    try:
        module, function = choose(args[0], COMMANDS).split(".")
    except ValueError as error:
        return _fail(str(error), 2)
    try:
        from t5jax.plan.chips import quieten_without_tpu

        quieten_without_tpu()
        command = getattr(importlib.import_module(f"t5jax.commands.{module}"), function)
        status = command(args[1:]) or 0
        if distributed := sys.modules.get("t5jax.distributed"):
            distributed.leave()
        return status
    except KeyboardInterrupt:
        hint = "; the same command goes on from the last checkpoint" if args[0] == "train" else ""
        if args[0] in ("eval", "infer") and any(word.startswith("--output") for word in args):
            hint = "; the same command goes on where it was"
        return _fail(f"interrupted{hint}", 130)
    except BrokenPipeError:  # The reader of our output, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("T5JAX_TRACEBACK"):
            _leave_others(str(error), error)
            raise
        return _fail(_full_disk(error) or str(error))
    except Exception as error:
        distributed = sys.modules.get("t5jax.distributed")
        if distributed and isinstance(error, distributed.Preempted):
            print(f"t5jax: {error}", file=sys.stderr)
            distributed.leave()
            return START_AGAIN
        from t5jax import storage

        text = storage.describe_error(error) or _full_disk(error)
        if text and not os.environ.get("T5JAX_TRACEBACK"):
            return _fail(text)
        # A fault of ours, which ends in a traceback.
        _leave_others(f"{type(error).__name__}: {error}", error)
        raise


def _full_disk(error: BaseException) -> str:
    """Returns what to say of a full disk, "" for another error, and for one that says it itself.

    TensorFlow's writers and others have errors of their own for it.
    """
    is_ours = isinstance(error, ValueError) and not isinstance(error, OSError)
    found = re.search("No space left on device|Disk quota exceeded", str(error))
    if not found or is_ours:
        return ""
    place = re.search(r"(?<![\w])/[^\s;'\"]+", str(error))
    where = f" of {place[0]}" if place else ""
    return f"the disk{where} is full ({found[0]}); make room, and give the same command again"


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Leaves out what TensorStore tells Orbax when a save has failed, which is raised besides."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Returns a warning in one line; where in our code it arose is of no use to a user."""
    what = "warning" if category is UserWarning else category.__name__
    return f"t5jax: {what}: {redact(' '.join(str(message).split()))}\n"


def _leave_others(message: str, error: Exception | None = None, status: int = 1) -> None:
    """Of several processes, ends this one, whose others would wait for it."""
    distributed = sys.modules.get("t5jax.distributed")
    if distributed and distributed.fail(message):
        if error:
            traceback.print_exception(error)
        else:
            print(f"t5jax: error: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _fail(message: str, status: int = 1) -> int:
    message = redact(message)
    _leave_others(message, status=status)
    print(f"t5jax: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
