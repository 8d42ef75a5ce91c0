"""`t5jax train`."""

import dataclasses
import inspect
import traceback

from t5jax import storage
from t5jax.commands.parse import parse, take_option


def train(args: list[str]) -> None:
    """Trains a config, whose fields can be overridden: `--data.batch-size 64`.

    If a run was stopped for any reason, the same command resumes it.
    """
    from t5jax.config import Config, to_json

    args, compiled = take_option(args, "--compiled")
    print_config = "--print-config" in args
    args = [arg for arg in args if arg != "--print-config"]
    prog, config = "t5jax train CONFIG", Config()
    known = ", ".join(known_configs())
    if args and not args[0].startswith("-"):
        prog, config = f"t5jax train {args[0]}", load_config_file(args[0])
        args = args[1:]
    elif "--help" not in args and "-h" not in args:
        raise ValueError(
            "train needs a CONFIG before its options: a Python file, a .json file that "
            f"--print-config wrote, or a name such as {known}"
        )
    description = (
        f"{inspect.cleandoc(train.__doc__)}\n\n--print-config prints the whole config as JSON "
        "instead. --compiled FILE takes the step that `t5jax plan --save` compiled. CONFIG is a "
        f"Python file, a .json file that --print-config wrote, or one of: {known}. With CONFIG "
        "before --help, defaults are those of that config. --adapter.rank and its like train "
        "LoRA, --adapter.prompt-length alone a soft prompt; without them there is no adapter."
    )
    config = with_sections(config, args)
    config = parse(Config, args, prog=prog, description=description, default=config)
    if print_config:
        print(to_json(config), end="")
        return
    from t5jax import distributed
    from t5jax.compilation import keep_programs
    from t5jax.train import train as run

    distributed.start()
    keep_programs()
    run(config, compiled=compiled)


def with_sections(config, args: list[str]):
    """Returns the config with the sections that options set, where it leaves them out."""
    from t5jax.config import LoraConfig, PromptConfig

    given = [arg for arg in args if arg.startswith("--adapter.")]
    asks = {"-h", "--help"} & set(args)
    if config.adapter is not None or not (given or asks):
        return config
    is_prompt = given and all(arg.startswith("--adapter.prompt") for arg in given)
    return dataclasses.replace(config, adapter=PromptConfig() if is_prompt else LoraConfig())


def load_config_file(name_or_path: str):
    """Returns the config of a file; errors in it name the line."""
    from t5jax import shipped
    from t5jax.config import from_json, load_config, split_config_name

    if name_or_path.endswith(".json"):
        try:
            path = storage.local(storage.path(name_or_path, "config"))
            return from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"config {name_or_path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{name_or_path}: {error}") from error

    path = str(shipped.find("configs", split_config_name(name_or_path)[0]))
    try:
        return load_config(name_or_path)
    except Exception as error:  # Any error in a user's code.
        frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            frames.append((error.filename, error.lineno))
        lines = [line for filename, line in frames if filename == path]
        where = f"{path}, line {lines[-1]}: " if lines else ""
        what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}{what}{getattr(error, 'msg', error)}") from error


def known_configs() -> list[str]:
    from t5jax import shipped

    return list(shipped.list_files("configs"))
