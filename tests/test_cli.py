"""The command line: what each mistake is answered with, and what goes to which stream."""

import dataclasses
import io
import json
import re
import shutil
import sys
import textwrap
import warnings

import numpy as np
import pytest

import tiny
from command_line import fails, run
from processes import Process, said_by_imports
from t5jax.cli import COMMANDS, main
from t5jax.commands.parse import parse
from t5jax.config import Config, LoraConfig, MeshConfig, from_json, to_json
from t5jax.decoding import Answer, GenerationOptions
from tiny import TASK_FILE, TINY, one_device, trained_run  # noqa: F401

TASK = """
from t5jax.data.tasks.prompted import prompted_task
from t5jax.data.sources.kinds import jsonl
from t5jax.metrics import exact_match

prompted_task({name!r}, jsonl({{"train": {train!r}, "validation": {train!r}}}),
              [("capitals: {{word}}", "{{capitals}}")], metrics=[exact_match], vocabulary="bytes")
"""


@pytest.fixture
def config(tmp_path):
    """A config file of TINY, as --print-config writes it, with its run in the test's folder."""
    path = tmp_path / "tiny.json"
    path.write_text(to_json(dataclasses.replace(TINY, run_dir=str(tmp_path / "run"))))
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    assert main(["export", str(trained_run()), str(folder)]) == 0
    return folder


# --- Streams and help -----------------------------------------------------------------------------


def test_without_a_command_the_usage(capsys):
    for args in ((), ("--help",), ("-h",)):
        status, out, err = run(capsys, *args)
        assert (status, err) == (0, "")
        assert all(f"  {command} " in out for command in COMMANDS)
    assert run(capsys, "--version")[1].count(".") == 2


def options_of(cls, prefix=""):
    for field in dataclasses.fields(cls):
        value = getattr(cls(), field.name)
        if field.name == "adapter":  # None, until one of its options is given.
            value = LoraConfig()
        if dataclasses.is_dataclass(value):
            yield from options_of(type(value), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}".replace("_", "-"), value


def test_help_of_train_shows_every_option_with_its_default(capsys):
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0
    # Behind the description, which names some of them.
    options = re.split(r"^.*\boptions [─ ]*", out, maxsplit=1, flags=re.MULTILINE)[1]
    text = " ".join(options.replace("│", " ").split())
    for name, value in options_of(Config):
        _, found, rest = text.partition(f" --{name}")
        assert found, name
        default = rest.split("(default: ")[1].split(")")[0]
        expected = " ".join(value) if isinstance(value, tuple) else str(value)
        expected = "''" if value == "" else expected
        assert default == expected, name
    assert "--print-config prints the whole config as JSON" in out
    assert "quickstart" in out


def test_help_has_the_defaults_of_a_config(capsys):
    out = run(capsys, "train", "quickstart", "--help")[1]
    assert "Total number of steps" in out
    assert "(default: runs/quickstart)" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("eval", ["MODEL", "--tasks [STR [STR ...]]", "--json {None}|PATH", "(default: test)"]),
        ("infer", ["MODEL", "--prompt", "--max-tokens {None}|INT", "--top-p"]),
        ("embed", ["MODEL", "--text", "--pooling {mean,first,max,pooler}", "--output"]),
        ("export", ["MODEL OUTPUT", "--dtype {float32,bfloat16}", "--overwrite", "--encoder-only"]),
        ("import", ["MODEL OUTPUT"]),
    ],
)
def test_help_of_the_other_commands(command, expected, capsys):
    status, out, err = run(capsys, command, "--help")
    assert (status, err) == (0, "")
    for text in expected:
        assert text in out
    assert "\n    Without" not in out  # Indented as in the source.
    assert "\n    Not needed" not in out


def test_print_config_is_read_back_and_is_a_config(config, capsys):
    args = ["--train.steps", "7", "--data.task-files", "a.py", "b.py", "--axes.embed", "None"]
    status, out, err = run(capsys, "train", config, *args, "--print-config")
    assert (status, err) == (0, "")
    printed = from_json(out)
    assert printed.train.steps == 7
    assert printed.data.task_files == ("a.py", "b.py")
    assert printed.axes.embed is None
    config.write_text(out)
    assert from_json(run(capsys, "train", config, "--print-config")[1]) == printed


def test_answers_alone_go_to_stdout(exported, capsys):
    prompts = ["capitals: ab", "capitals: c"]
    options = ["--max-tokens", "4"]
    status, out, err = run(capsys, "infer", exported, "--prompt", *prompts, *options)
    assert status == 0
    assert err == ""
    assert len(out.splitlines()) == 2
    for model in (["--model", exported], [f"--model={exported}"]):
        assert run(capsys, "infer", "--prompt", *prompts, *options, *model) == (0, out, "")


@pytest.mark.parametrize("command", ["eval", "infer", "embed"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x", "--model", "y"], "there are 2 models, y and x; give one, either as MODEL or as --m"),
        (["--model=x", "--model", "y"], "there are 2 models, x and y"),
        (["--batch-size", "1", "--model"], "--model has no value; give a model"),
        (["--model", "--batch-size", "1"], "--model has no value; give a model"),
    ],
)
def test_one_model_in_one_of_two_ways(command, args, message, capsys):
    assert message in fails(capsys, command, *args)


@pytest.mark.parametrize("command", ["eval", "infer", "embed"])
def test_no_model(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command])
    assert exit_.value.code == 2
    assert "MODEL" in capsys.readouterr().err


def test_export_and_import_say_what_they_wrote(exported, tmp_path, capsys):
    status, out, err = run(capsys, "import", exported, tmp_path / "run")
    assert (status, out, err) == (0, "", f"wrote {tmp_path / 'run'}\n")
    status, out, err = run(capsys, "export", tmp_path / "run", tmp_path / "hf")
    assert (status, out, err) == (0, "", f"wrote {tmp_path / 'hf'}\n")


class Fake:
    """Stands for a model: what it is asked for, and answers of two lines."""

    def __init__(self):
        self.asked = []

    def load(self, *args, **options):
        self.asked.append((*args, options))
        return self

    def options(self, **given):
        given = {name: value for name, value in given.items() if value is not None}
        return GenerationOptions(**given)

    def answers(self, texts, how, **options):
        self.asked.append((texts, how, options))
        return [[Answer(f"{text}\nanswered", [7], "stop")] * how.num_answers for text in texts]

    def check_writes(self):
        pass

    tokenizer = None

    def embed(self, texts, **options):
        self.asked.append((texts, options))
        return np.array([[0.1, i] for i in range(len(texts))], np.float32)


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr("t5jax.pretrained.load", fake.load)
    return fake


def test_options_of_infer_reach_the_model(fake, capsys, monkeypatch):
    options = ["--max-tokens", "3", "--batch-size", "2", "--dtype", "bfloat16", "--mesh.model", "2"]
    command = ["infer", "--model", "m", *options, "--base", "b"]
    status, out, _ = run(capsys, *command, "--prompt", "a b", "c")
    assert (status, out) == (0, "a b\nanswered\nc\nanswered\n")
    assert fake.asked == [
        (
            "m",
            {"dtype": "bfloat16", "mesh": MeshConfig(model=2), "base": "b", "kv_cache": None},
        ),
        (
            ["a b", "c"],
            GenerationOptions(max_tokens=3),
            {"batch_size": 2, "special_tokens": False, "rows": 2, "first": 0},
        ),
    ]
    # Of prompts that are lines, each answer is one.
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b\n\n"))
    assert run(capsys, *command)[1] == "a b answered\n answered\n"
    assert fake.asked[-1][0] == ["a b", ""]


def test_a_line_of_standard_input_ends_at_a_newline_alone(fake, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("a\u2028b\u0085c\x0cd\re\r\n\n f".encode()), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    run(capsys, "infer", "m")
    assert fake.asked[-1][0] == ["a\u2028b\u0085c\x0cd\re", "", " f"]


def test_options_of_embed_reach_the_model(fake, tmp_path, capsys):
    options = ["--pooling", "max", "--max-length", "7", "--batch-size", "2"]
    command = ["embed", "--model", "m", *options, "--text", "a", "b"]
    status, out, err = run(capsys, *command)
    assert (status, err) == (0, "")
    assert out == "[0.1, 0.0]\n[0.1, 1.0]\n"  # As few digits as tell a float32.
    expected = {"pooling": "max", "max_length": 7, "batch_size": 2}
    how = {"dtype": None, "mesh": MeshConfig(), "base": ""}
    assert fake.asked == [("m", how), (["a", "b"], expected)]
    path = tmp_path / "vectors.npy"
    status, out, err = run(capsys, *command, "--output", path)
    assert (status, out, err) == (0, "", f"wrote {path}: 2 x 2\n")
    assert np.load(path).tolist() == np.float32([[0.1, 0], [0.1, 1]]).tolist()
    message = fails(capsys, *command, "--output", tmp_path / "vectors.txt")
    assert "expected a file that ends in .npy, in a folder that exists" in message


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("what is wrong"), 1, "what is wrong"),
        (OSError("disk full"), 1, "disk full"),
    ],
)
def test_exit_status_of_what_goes_wrong(error, status, message, fake, capsys, monkeypatch):
    monkeypatch.setattr(fake, "load", lambda *_, **__: throw(error))
    monkeypatch.setattr("t5jax.pretrained.load", fake.load)
    answer = run(capsys, "infer", "--model", "m", "--prompt", "a")
    assert answer == (status, "", f"t5jax: error: {message}\n")


def throw(error):
    raise error


def test_an_interrupted_run_is_told_how_it_goes_on(config, capsys, monkeypatch):
    monkeypatch.setattr("t5jax.train.train", lambda _, compiled: throw(KeyboardInterrupt()))
    hint = "interrupted; the same command goes on from the last checkpoint"
    assert run(capsys, "train", config) == (130, "", f"t5jax: error: {hint}\n")


def test_a_warning_is_one_line_without_our_code(fake, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # To have it back.
    run(capsys, "infer", "MODEL", "--prompt", "a")
    shown = warnings.formatwarning(UserWarning("take\ncare"), UserWarning, "io.py", 3, "code")
    assert shown == "t5jax: warning: take care\n"


def test_an_unknown_command_is_a_wrong_use():
    assert main(["trian"]) == 2


def test_prompts_and_answers_through_a_pipe_without_noise(exported):
    words = ["-m", "t5jax.cli", "infer", "--model", exported, "--max-tokens", "4"]
    ended = Process(*words, input="capitals: ab\ncapitals: c\n\n").wait()
    assert (ended.status, ended.err, said_by_imports()) == (0, "", "")
    assert ended.out.count("\n") == 3


def test_a_run_writes_nothing_that_is_not_ours(config):
    ended = Process("-m", "t5jax.cli", "train", config, "--train.steps", "5").wait()
    assert (ended.status, ended.out, said_by_imports()) == (0, "", "")
    starts = (
        "reading tasks",
        "18,800 parameters on 1 cpu device",
        "step ",
        "best validation loss ",
        "done: ",
        "attention: ",
        " ",  # Scores and samples.
    )
    lines = [x for x in ended.err.splitlines() if not re.match("[0-9.,]+ s: steps ", x)]
    strange = [x for x in lines if x and not x.startswith(starts)]
    assert not strange


# --- Mistakes in the command ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "there is no command 'trian'; did you mean train? known are train, "),
        (["train"], "train needs a CONFIG before its options: a Python file, a .json file"),
        (["train", "quickstrat"], "there is no config 'quickstrat'; did you mean quickstart?"),
        (["train", "absent.py"], "there is no file absent.py"),
        (["train", "absent.json"], "config absent.json cannot be read: No such file"),
        (["train", "CONFIG", "--train.stpes", "3"], "Perhaps you meant: --train.steps INT"),
        (["train", "CONFIG", "--optimizer.name", "adm"], "Expected one of ('adafactor', 'adamw'"),
        (["train", "CONFIG", "--train.steps", "many"], "Error parsing --train.steps"),
        (
            ["train", "CONFIG", "--optimizer.learning-rate", "None"],
            "Error parsing --optimizer.lear",
        ),
        (["train", "CONFIG", "--optimizer.learning-rate", "0"], "learning_rate is 0.0; expected a"),
        (["train", "CONFIG", "--optimizer.learning-rate", "-1"], "learning_rate is -1.0; expected"),
        (["train", "CONFIG", "--optimizer.learning-rate", "nan"], "learning_rate is nan; expected"),
        (["train", "CONFIG", "--model.dtype", "float16"], "Expected one of ('float32', 'bfloat16"),
        (["train", "CONFIG", "--run-dir", "/proc/t5jax"], "run folder /proc/t5jax cannot be writ"),
        (["train", "CONFIG", "--run-dir", "FILE/x"], "x cannot be written (Not a directory)"),
        (["train", "CONFIG", "--run-dir", "FILE"], "cannot be written (File exists); choose anoth"),
        (["train", "CONFIG", "--run-dir", "FILE[v2]"], "does not take [ and ] in a path literally"),
        (["train", "CONFIG", "--data.mixture", "capitols"], "no task file registers; did you mean"),
        (["train", "CONFIG", "--init.model", "owner/absent"], "the hub cannot be reached"),
        (
            ["infer", "--model", "x", "--prompt", "a", "--max-tokens", "0"],
            "--max-tokens is 0; it must be at least 1",
        ),
        (
            ["infer", "--model", "x", "--prompt", "a", "--batch-size", "0"],
            "--batch-size is 0; it must be at least 1",
        ),
        (["infer", "--model", "./absent", "--prompt", "a"], "there is no folder ./absent; give on"),
        (["infer", "--model", "owner/absent", "--prompt", "a"], "check the network, or download"),
        (["eval"], "Missing from t5jax eval: MODEL"),
        (["eval", "RUN", "--split", "dev"], "no split 'dev'; there are train, validation"),
        (["export", "RUN", "/proc/t5jax"], "/proc/t5jax cannot be written"),
        (["export", "RUN"], "Missing from t5jax export: OUTPUT"),
        (["import", "RUN", "FILE/x"], "x cannot be written (Not a directory)"),
    ],
)
def test_mistakes_in_a_command(args, message, config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {"CONFIG": str(config), "FILE": str(tmp_path / "file"), "RUN": str(trained_run())}
    for name, place in places.items():
        args = [place + arg.removeprefix(name) if arg.startswith(name) else arg for arg in args]
    assert message in fails(capsys, *args)


@dataclasses.dataclass(frozen=True)
class Lists:
    """Options, two of which are lists."""

    space: tuple[str, ...] = ()
    stop: tuple[str, ...] | None = None
    num: int = 0
    mesh: MeshConfig = MeshConfig()


@pytest.mark.parametrize(
    ("args", "space", "stop"),
    [
        (["--space", "a", "--space", "b", "c", "--num", "1"], ("a", "b", "c"), None),
        (["--space", "a", "--num", "1", "--stop", "x", "--space=b"], ("a", "b"), ("x",)),
        (["--space", "a", "b", "--stop=--x", "--num", "1"], ("a", "b"), ("--x",)),
    ],
)
def test_a_list_that_is_given_in_several_options_is_whole(args, space, stop):
    found = parse(Lists, args, prog="lists")
    assert (found.space, found.stop, found.num) == (space, stop, 1)


def test_lists_of_a_config_are_whole_too():
    args = ["--data.mixture-changes", "1:a", "--train.steps=2", "--data.mixture_changes", "2:b"]
    config = parse(Config, args, prog="train", default=Config())
    assert config.data.mixture_changes == ("1:a", "2:b")


def test_no_prompts(exported, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    message = fails(capsys, "infer", "--model", exported)
    assert (
        "there is no prompt; give --prompt TEXT, --input FILE, or lines on standard input"
        in message
    )


@pytest.mark.usefixtures("eight_devices_cli")
def test_batch_that_the_mesh_does_not_divide(config, capsys):
    message = fails(capsys, "train", config, "--data.batch-size", "12")
    assert "data.batch_size 12 is not divisible by data x fsdp = 8 devices; use 8 or 16" in message


@pytest.fixture
def eight_devices_cli(one_device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tiny.sharding, "make_mesh", tiny._make_mesh)


# --- Mistakes in files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def get_config(:\n    pass", "broken.py, line 1: SyntaxError: invalid syntax"),
        ("\ndef get_config():\n    return 1 / 0", "line 3: ZeroDivisionError: division by zero"),
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1", "broken.py has no get_config(); a config file defines get_config() -> Config"),
        ("def get_config():\n    return 3", "returned int, not a Config"),
        (
            "from t5jax.config import *\ndef get_config():\n    return Config(\n"
            "        optimizer=OptimizerConfig(learning_rate=None))",
            "broken.py, line 4: optimizer.learning_rate is None; expected a positive number",
        ),
        (
            "from t5jax.config import *\ndef get_config():\n    return Config(trian=TrainConfig())",
            "line 3: TypeError: Config.__init__() got an unexpected keyword argument 'trian'",
        ),
    ],
)
def test_broken_config_file(code, message, tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text(code)
    assert message in fails(capsys, "train", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "broken.json: Expecting property name"),
        ('{"trian": {}}', "config field trian does not exist; did you mean train?"),
        ('{"train": {"steps": "ten"}}', "config field train.steps is 'ten'; expected int"),
        ('{"optimizer": {"learning_rate": null}}', "optimizer.learning_rate is None; expected"),
        ("[]", "is []; expected"),
    ],
)
def test_broken_config_json(text, message, tmp_path, capsys):
    path = tmp_path / "broken.json"
    path.write_text(text)
    assert message in fails(capsys, "train", path)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("cli_missing", None, "task 'cli_missing': there is no file"),
        ("cli_empty", "", "is empty; expected one JSON object a line"),
        ("cli_malformed", '{"word": "a", "capitals": "A"}\n{"word\n', "line 2 is not JSON"),
        ("cli_field", '{"word": "a"}\n', "there is no field 'capitals'; the row has word"),
    ],
)
def test_data_files(name, lines, message, config, tmp_path, capsys):
    data = tmp_path / "train.jsonl"
    if lines is not None:
        data.write_text(lines)
    task = tmp_path / "task.py"
    task.write_text(TASK.format(name=name, train=str(data)))
    args = ["--data.task-files", task, "--data.mixture", name]
    for every in ("0", "5"):  # Met by training, and by evaluation.
        assert message in fails(capsys, "train", config, *args, "--eval.every", every)


def test_broken_task_file(config, tmp_path, capsys):
    task = tmp_path / "task.py"
    task.write_text("import no_such_module")
    message = fails(capsys, "train", config, "--data.task-files", task)
    assert f"task file {task} fails: ModuleNotFoundError: No module named 'no_such" in message


@pytest.mark.parametrize("command", ["infer", "train", "import"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "is not a whole safetensors file"),
        ("architecture", "model_type is 'bart'; expected one of t5"),
        ("shape", "lm_head.weight"),
    ],
)
def test_damaged_models(command, damage, message, exported, config, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "model")
    if damage == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        text = json.loads((folder / "config.json").read_text())
        changes = {"model_type": "bart"} if damage == "architecture" else {"vocab_size": 512}
        (folder / "config.json").write_text(json.dumps(text | changes))
    options = {
        "infer": ["infer", "--model", folder, "--prompt", "a"],
        "train": ["train", config, "--init.model", folder, "--eval.every", "0"],
        "import": ["import", folder, tmp_path / "imported"],
    }
    if (command, damage) == ("train", "shape"):
        message = "model.vocab_size is 384, in"
    assert message in fails(capsys, *options[command])
    assert not (tmp_path / "imported" / "checkpoints").exists()


def test_run_that_cannot_go_on_and_one_that_diverges(config, tmp_path, capsys):
    run_dir = trained_run(copy_to=tmp_path / "run")
    before = tiny.contents(run_dir)
    message = fails(capsys, "train", config, "--model.d-model", "32", "--train.steps", "20")
    assert "cannot go on: model.d_model was 16 and is 32; set it back, or begin a new" in message
    assert tiny.contents(run_dir) == before
    options = ["--optimizer.learning-rate", "1e30", "--train.steps", "20", "--eval.every", "0"]
    message = fails(capsys, "train", config, *options)
    assert "at step 12; the last good checkpoint stands" in message


def test_traceback_on_demand(config, monkeypatch):
    monkeypatch.setenv("T5JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no folder ./absent"):
        main(["infer", "--model", "./absent", "--prompt", "a"])


@pytest.mark.parametrize(("args", "status"), [("--version", 0), ("unknown", 2)])
def test_a_process_ends_though_something_waits_for_ever_in_its_clean_up(args, status):
    """As an iterator of tf.data does for a thread that waits for Python."""
    code = """
        import sys, time

        class Waits:
            def __del__(self):
                time.sleep(1000)

        sys.modules["waits"] = waits = Waits()
        sys.argv = ["t5jax", sys.argv[1]]
        from t5jax.cli import main
        sys.exit(main())
    """
    ended = Process("-c", textwrap.dedent(code), args).wait()
    assert ended.status == status
    assert (ended.out + ended.err).strip()
