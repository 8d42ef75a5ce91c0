"""`t5jax infer`: answers to prompts, from the command line, a stream, or a file of any size."""

import contextlib
import dataclasses
import datetime
import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from t5jax import storage
from t5jax.bulk.output import AnswersFile, read_run, sample_of
from t5jax.bulk.reading import (
    Render,
    count_prompts,
    field_of,
    read_lines,
    read_prompts,
    shard_file,
    shard_of,
    share,
)
from t5jax.commands.parse import check_options, model_first, parse
from t5jax.config import MeshConfig
from t5jax.storage import to_json

_BATCHES = 4  # That are read at a time, to put prompts of like lengths together.


@dataclasses.dataclass(frozen=True)
class Infer:
    """Answers prompts. Only answers go to standard output.

    Without --prompt and --input, each line of standard input is a prompt, and each line of output
    an answer. Options whose default is None are those of the model's generation_config.json, which
    are taken as transformers takes them; without any, answers are greedy.
    """

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint; or --model
    MODEL."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    input: Path | None = None
    """A file of prompts, one a line: texts, or JSON if it ends in .jsonl. "-": standard input."""
    output: Path | None = None
    """A file for the answers: JSON lines with tokens and scores if it ends in .jsonl, otherwise
    texts. The same command goes on where it was stopped."""
    shard: str | None = None
    """Answer one of several shares of the prompts of --input, for machines that know nothing of
    each other: 0/4 is the first quarter. Its file is OUTPUT-00000-of-00004; in the order of their
    names, all are what one command would write."""
    json_lines: bool = False
    """Standard input and output are JSON lines."""
    field: str = "prompt"
    """The field of a JSON line that holds the prompt."""
    template: str | None = None
    """A Jinja template that makes the prompt of a JSON line, such as "Summarize: {{ text }}"."""
    chat: bool = False
    """Prompts are what a user says, or the field messages of JSON lines a conversation, to which
    the model's chat template is applied."""
    system: str | None = None
    """With --chat, the system message in front of each prompt."""
    max_tokens: int | None = None
    """Maximum length of an answer in tokens. None: as in generation_config.json, or 64."""
    min_tokens: int | None = None
    """No id ends an answer before it has this many tokens; a stop text may."""
    temperature: float | None = None
    """Draw tokens, after dividing logits by it; 0: take the most probable token."""
    top_k: int | None = None
    """Only draw one of the k most probable tokens; 0: any. As in transformers, 50 where tokens are
    drawn and nothing is set."""
    top_p: float | None = None
    """Only draw one of the most probable tokens that together have this probability."""
    min_p: float | None = None
    """Only draw a token at least this probable, times the probability of the most probable one."""
    seed: int | None = None
    """What drawn tokens depend on, beside the prompt's number. None: 0."""
    repetition_penalty: float | None = None
    """Divide the logits of tokens that were read or written before by it."""
    no_repeat_ngram_size: int | None = None
    """No sequence of this many tokens occurs twice."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: float | None = None
    """Subtracted from the logits of tokens that the answer has, as often as it has them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Ids, each with what is added to its logit: --logit-bias 7 -100 9 2.5"""
    num_beams: int | None = None
    """Beam search with this many beams; 1: none."""
    length_penalty: float | None = None
    """A beam's score is the sum of log-probabilities divided by its length to this power."""
    early_stopping: Literal["true", "false", "never"] | None = None
    """When beam search ends: once there are num_beams answers (true), once better ones are unlikely
    (false) or impossible (never)."""
    num_answers: int | None = None
    """Answers to each prompt: several samples, or the best beams."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""
    forced_tokens: tuple[int, ...] = ()
    """Ids that every answer begins with."""
    suppressed_tokens: tuple[int, ...] = ()
    """Ids that are never written."""
    allowed_tokens: tuple[int, ...] = ()
    """The only ids that are written, besides those that end a text."""
    json_schema: str | None = None
    """A JSON schema that answers satisfy, or a file with one; "{}" for any JSON object."""
    regex: str | None = None
    """A regular expression that answers match as a whole."""
    logprobs: int | None = None
    """In JSON lines: the log-probability of each token, and this many alternatives."""
    batch_size: int = 32
    """Prompts per batch."""
    special_tokens: bool = False
    """Show special tokens in answers, such as T5's <extra_id_0> in front of the text of a gap."""
    base: str = ""
    """Of an adapter: where its base is now. Empty: where the adapter says."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of computation and parameters. None: as in training."""
    kv_cache: Literal["int8"] | None = None
    """int8: keep keys and values in a quarter of the memory. None: as the model says."""
    mesh: MeshConfig = MeshConfig()
    """Devices to use."""


_GENERATION = (
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed"),
    *("repetition_penalty", "no_repeat_ngram_size", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "num_beams", "length_penalty"),
    *("early_stopping", "num_answers", "stop", "forced_tokens", "suppressed_tokens"),
    *("allowed_tokens", "json_schema", "regex", "logprobs"),
)
# What does not change the answers, or is compared in another form.
_NO_EFFECT = ("prompt", "input", "output", "shard", "batch_size", "mesh")


def infer(args: list[str]) -> None:
    options = parse(Infer, model_first(args), prog="t5jax infer", positional=True)
    _check(options)
    from t5jax import distributed
    from t5jax.compilation import keep_programs

    distributed.start()
    with contextlib.ExitStack() as stack:
        options, output = _places(options)
        lines, total = _lines(options, stack)
        start, stop, number = 0, total, 0
        if options.shard is not None:
            start, stop = share(total or 0, *shard_of(options.shard))
        answers_file = None
        if output is not None and distributed.is_main():
            # Before the model, which may take long to load.
            lines_per_prompt = 1 if _writes_json(options) else options.num_answers or 1
            place = stack.enter_context(storage.staged(output, beside=[".run.json"]))
            run = _run(options, place.path, (start, stop) if options.shard else None)
            answers_file = stack.enter_context(AnswersFile(place.path, run, lines_per_prompt))
        # Hosts need not see each other's disks: one writes, and says how far it is.
        done = distributed.from_first_process(
            lambda: 0 if answers_file is None else answers_file.num_prompts
        )
        _check_same_prompts(options, total)
        keep_programs()
        from t5jax.monitor.progress import counting
        from t5jax.pretrained import load

        model = load(
            options.model,
            dtype=options.dtype,
            mesh=options.mesh,
            base=options.base,
            kv_cache=options.kv_cache,
        )
        model.check_writes()
        how = model.options(**_generation(options))
        if options.seed is not None and how.temperature == 0:
            raise ValueError(
                f"--seed {options.seed} would change nothing, since no tokens are drawn; give "
                "--temperature, 1 for the model's own probabilities, or leave it out"
            )
        if output is not None and not _writes_json(options):
            _check_number(options, how.num_answers)
        first = start + done
        render = _render(options, model.tokenizer)
        prompts: Iterator[tuple[Any, Any]] = read_prompts(
            lines, _name(options), render, first, stop
        )
        if options.chat and not _reads_json(options):
            as_chat = _chat(options, model.tokenizer)
            prompts = ((text, as_chat(text)) for text, _ in prompts)
        if options.chat:
            prompts = ((given, model.chat_prompt(text)) for given, text in prompts)
        shown = answers_file is not None
        bar = stack.enter_context(
            counting("prompts", None if stop is None else stop - start, done, shown=shown)
        )
        rows = options.batch_size if total is None or total >= options.batch_size else total
        number = first
        while window := list(itertools.islice(prompts, _BATCHES * options.batch_size)):
            try:
                answers = model.answers(
                    [prompt for _, prompt in window],
                    how,
                    batch_size=options.batch_size,
                    special_tokens=options.special_tokens,
                    rows=min(rows, max(number, len(window))) if total is None else rows,
                    first=number,
                )
            except ValueError as error:
                if not number:
                    raise
                raise ValueError(f"{error} (counted from prompt {number})") from error
            written = [
                line
                for (given, _), own in zip(window, answers, strict=True)
                for line in _written(options, given, own)
            ]
            number += len(window)
            if answers_file is not None:
                answers_file.write(written, len(window))
            elif output is None and distributed.is_main():
                print("\n".join(written), flush=True)
            bar(number - start)
        if not number and not options.shard:
            raise ValueError(
                "there is no prompt; give --prompt TEXT, --input FILE, or lines on standard input"
            )
    if answers_file is not None:
        again = f", {done} of them before" if done else ""
        print(f"wrote {output}: {number - start} prompts{again}", file=sys.stderr)


def _places(options: Infer) -> tuple[Infer, Path | None]:
    """Returns the options with files of this machine to read, and where answers are written."""
    if options.input is not None and str(options.input) != "-":
        there = storage.local(storage.path(options.input, "--input"))
        options = dataclasses.replace(options, input=there)
    if options.output is None:
        return options, None
    output = storage.path(options.output, "--output")
    if not storage.is_remote(output) and not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}; make it first")
    return options, shard_file(output, *shard_of(options.shard)) if options.shard else output


def _check_same_prompts(options: Infer, total: int | None) -> None:
    """Raises ValueError if several hosts would not be asked the same."""
    import jax

    from t5jax import distributed

    if jax.process_count() == 1:
        return
    if total is None:
        raise ValueError(
            "each of several hosts has a standard input of its own; give --input FILE, which all "
            "of them can read"
        )
    if options.shard is not None:
        raise ValueError(
            "--shard is for machines that know nothing of each other, and these hosts share the "
            "work by themselves; leave it out"
        )
    sample = list(options.prompt) or sample_of(options.input or Path(), 1 << 30)
    remedy = "give every host the same prompts"
    distributed.check_same(to_json([total, sample]), "what is asked", remedy)


def _check(options: Infer) -> None:
    check_options(options, 1, "max_tokens", "batch_size", "num_answers", "num_beams")
    if options.prompt and options.input is not None:
        raise ValueError("--prompt and --input are both given; give one of them")
    if options.system is not None and not options.chat:
        raise ValueError("--system is for --chat; add --chat, or write it into the prompt")
    if options.template is not None and (options.chat or not _reads_json(options)):
        raise ValueError(
            "--template makes prompts of JSON lines; give a .jsonl file with --input, or "
            "--json-lines, and no --chat"
        )
    for name in ("input", "output"):
        file = getattr(options, name)
        if file is not None and file.suffix == ".json":
            raise ValueError(
                f"--{name} {file}: expected a file of JSON lines, which ends in .jsonl, or of "
                "texts, which ends otherwise; rename it"
            )
    from_stdin = not options.prompt and (options.input is None or str(options.input) == "-")
    if options.json_lines and not from_stdin and options.output is not None:
        raise ValueError(
            "--json-lines is of standard input and output, and neither is used; leave it out: a "
            "file is of JSON lines if its name ends in .jsonl"
        )
    if options.field != Infer.field and not _reads_json(options):
        raise ValueError(
            f"--field {options.field} is of JSON lines; give a .jsonl file with --input, or "
            "--json-lines"
        )
    if options.logprobs is not None and not _writes_json(options):
        raise ValueError(
            "--logprobs are written to JSON lines; add --json-lines, or --output FILE.jsonl"
        )
    if options.shard is not None:
        shard_of(options.shard)
        from_file = options.input is not None and str(options.input) != "-"
        if not from_file or options.output is None:
            raise ValueError("--shard divides a file; give --input FILE and --output FILE")


def _check_number(options: Infer, num_answers: int) -> None:
    if num_answers != (options.num_answers or 1):
        raise ValueError(
            f"generation_config.json asks for {num_answers} answers; give --num-answers, so that "
            "the lines of each prompt are known, or write JSON lines (--output FILE.jsonl)"
        )


# --- Prompts --------------------------------------------------------------------------------------


def _lines(options: Infer, stack: contextlib.ExitStack) -> tuple[Iterator[str], int | None]:
    """Returns the lines to read, and how many there are if that is known."""
    if options.prompt:
        return iter(options.prompt), len(options.prompt)
    if options.input is not None and str(options.input) != "-":
        try:
            total = count_prompts(options.input, are_json=_reads_json(options))
            file = stack.enter_context(options.input.open("rb"))
        except OSError as error:
            raise ValueError(f"cannot read {options.input}: {error.strerror}") from None
        if not total:
            raise ValueError(f"{options.input} is empty; expected a prompt on each line")
        return read_lines(file, str(options.input)), total
    if sys.stdin.isatty():
        print("one prompt a line; Ctrl-D ends", file=sys.stderr)
    # Bytes, since otherwise a lone \r would end a line as well.
    file = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())
    return read_lines(file, _name(options)), None


def _name(options: Infer) -> str:
    if options.prompt:
        return "--prompt"
    from_file = options.input is not None and str(options.input) != "-"
    return str(options.input) if from_file else "standard input"


def _reads_json(options: Infer) -> bool:
    if options.prompt:
        return False
    if options.input is not None and str(options.input) != "-":
        return options.input.suffix in (".jsonl", ".ndjson")
    return options.json_lines


def _writes_json(options: Infer) -> bool:
    if options.output is not None:
        return options.output.suffix in (".jsonl", ".ndjson")
    return options.json_lines


def _render(options: Infer, tokenizer: Any) -> Render | None:
    if not _reads_json(options):
        return None
    if options.chat:
        return _chat(options, tokenizer)
    if options.template is None:
        return field_of(options.field)
    from t5jax.data.prompts.jinja import JinjaTemplate

    template = JinjaTemplate(options.template + " ||| ", name="template")

    def render(row: Any) -> str:
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {str(row)[:80]}")
        return str(template.render(row).inputs)

    return render


def _chat(options: Infer, tokenizer: Any) -> Render:
    """Returns a function that makes a prompt of a text, or of a row with messages."""
    from t5jax.data.prompts.chat import ChatTemplate

    if not tokenizer.chat_template:
        raise ValueError(
            f"{options.model} has no chat template, so --chat has no form to write in; leave "
            "--chat out, or add chat_template.jinja to the model's folder"
        )
    template = ChatTemplate().bind(tokenizer)
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    today = datetime.datetime.now().strftime

    def render(row: Any) -> str:
        if isinstance(row, str):
            row = {"messages": [{"role": "user", "content": row}]}
        elif isinstance(row, list):
            row = {"messages": row}
        elif isinstance(row, dict) and "messages" not in row and options.field in row:
            row = {"messages": [{"role": "user", "content": row[options.field]}]}
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object with messages, got {str(row)[:80]}")
        if system and isinstance(row.get("messages"), list):
            row = row | {"messages": [*system, *row["messages"]]}
        messages = row.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not last or (isinstance(last, dict) and last.get("role") == "assistant"):
            raise ValueError(
                f"field 'messages' {'ends with a reply' if last else 'is missing or empty'}; "
                "expected a conversation that ends with a message to reply to"
            )
        return template.prompt(row, strftime_now=today)

    return render


# --- Options and answers --------------------------------------------------------------------------


def _generation(options: Infer) -> dict[str, Any]:
    """Returns the options of generation that are given."""
    given = {name: getattr(options, name) for name in _GENERATION}
    given |= {name: None for name in _GENERATION if given[name] == ()}
    schema = options.json_schema
    if schema is not None and not schema.lstrip().startswith("{"):
        try:
            file = storage.local(storage.path(schema, "--json-schema"))
            given["json_schema"] = file.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"--json-schema {schema}: {error.strerror}; give a file, or the schema itself"
            ) from None
    return given


def _written(options: Infer, given: Any, answers: list[Any]) -> Iterator[str]:
    """Yields the lines for a prompt."""
    if _writes_json(options):
        yield to_json({"prompt": given, "answers": [_as_json(one) for one in answers]})
        return
    for answer in answers:
        is_shown_whole = bool(options.prompt) and options.output is None
        yield answer.text if is_shown_whole else answer.text.replace("\n", " ")


def _as_json(answer: Any) -> dict[str, Any]:
    found = {"text": answer.text, "finish": answer.finish, "tokens": answer.tokens}
    for name in ("score", "log_probs"):
        if getattr(answer, name) is not None:
            found[name] = getattr(answer, name)
    if answer.top is not None:
        found["top"] = [[list(pair) for pair in pairs] for pairs in answer.top]
    return found


def _run(options: Infer, output: Path, shard: tuple[int, int | None] | None) -> dict[str, Any]:
    """Returns what determines the answers, to be compared when the command is given again.

    Args:
      options: of the command.
      output: the file of answers.
      shard: the first prompt and the one behind the last, if they are a share.
    """
    from t5jax.source import find

    run = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in _NO_EFFECT
    }
    run |= _generation(options) | {"seed": options.seed or 0}
    if storage.path(options.model, "--model").is_dir():
        source = find(options.model, base=options.base)
        run["model_files"] = [list(storage.files(place).items()) for place in source.places]
    if options.input is not None and str(options.input) != "-":
        size = (read_run(output).get("input") or {}).get("bytes")
        run["input"] = sample_of(options.input, size)
    elif options.prompt:
        run["prompts"] = list(options.prompt)
    if shard:
        run["shard"] = list(shard)
    return run
