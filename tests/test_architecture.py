"""Dependencies point one way, and the heavy packages stay where they belong."""

import ast
import functools
import textwrap
from pathlib import Path

import pytest

from processes import run_python
from t5jax.architectures import FAMILIES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "t5jax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# The order of the design, from the top down: a module imports only from rows below its own, or
# from a neighbour in its row that does not import it back. A package's name stands for its files.
ORDER = [
    {"t5jax.cli"},
    {"t5jax.commands"},
    {"t5jax.report", "t5jax.sweep"},
    {"t5jax.train", "t5jax.serving", "t5jax.lm_eval", "t5jax.doctor", "t5jax.tradeoff"},
    {"t5jax.plan", "t5jax.distill.cache"},
    {"t5jax.bulk", "t5jax.pretrained", "t5jax.program"},
    {"t5jax.quantize.compress", "t5jax.prune.prune", "t5jax.prune.trim"},
    {"t5jax.prune.folder"},
    {"t5jax.evaluation", "t5jax.convert", "t5jax.distill"},
    {"t5jax.source"},
    {"t5jax.t5x"},
    {"t5jax.quantize.files", "t5jax.quantize.calibrate"},
    {"t5jax.checkpoint", "t5jax.decoding", "t5jax.hf", "t5jax.train_step"},
    {"t5jax.train_state", "t5jax.monitor"},
    {"t5jax.losses", "t5jax.optimizers", "t5jax.adapters"},
    {"t5jax.prune", "t5jax.quantize.matrices"},
    {"t5jax.models"},
    {"t5jax.sharding", "t5jax.distributed", "t5jax.compilation", "t5jax.quantize"},
    {"t5jax.data.batches.converters", "t5jax.special_tokens"},
    {"t5jax.data.batches.examples", "t5jax.tokenizers", "t5jax.metrics"},
    {"t5jax.batch"},
    {"t5jax.config"},
    {"t5jax.architectures", "t5jax.shipped"},
    {"t5jax.html", "t5jax.checksums", "t5jax.run_lock"},
    {"t5jax.storage"},
    {"t5jax.buckets"},
    {
        *("t5jax.checks", "t5jax.host_memory", "t5jax.maintenance", "t5jax.rendezvous"),
        *("t5jax.secrets", "t5jax.trees", "t5jax.bits"),
    },
]
# The rooms of t5jax.data, in the same way. The package itself imports nothing but on demand.
DATA_ORDER = [
    {"inspector", "pipeline"},
    {"streamed", "texts", "cache"},
    {"registry", "mixtures"},
    {"tasks"},
    {"prompts", "recipe"},
    {"sources", "objectives"},
    {"batches", "bridge", "fingerprint", "stamps"},
    {"run", "segments"},
]
# Leaves: what they import is as light as they need it, who imports them does so in functions.
LEAVES = "t5jax.data"


class Import:
    """One import statement: what, and whether it runs when its file is imported."""

    def __init__(self, name: str, lazy: bool):
        self.name, self.lazy = name, lazy


@functools.cache
def imports(path: Path) -> list[Import]:
    found = []

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from t5jax.data import pipeline` imports a module, `from t5jax.batch import Batch`
            # a name of t5jax.batch.
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.append(Import(name if name in MODULES else node.module, lazy))
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return found


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def row(module: str) -> int | None:
    for number, names in enumerate(ORDER):
        if any(is_in(module, name) for name in names):
            return number
    return None


def test_every_module_has_its_place():
    homeless = [m for m in MODULES if row(m) is None and not is_in(m, LEAVES) and m != "t5jax"]
    assert not homeless, "write these into ORDER, where the design has them"
    for names in ORDER:
        for name in names:
            assert any(is_in(m, name) for m in MODULES), f"{name} is gone"


@pytest.mark.parametrize("module", [m for m in MODULES if row(m) is not None])
def test_imports_point_down(module):
    for found in imports(MODULES[module]):
        if found.lazy or not is_in(found.name, "t5jax") or found.name == "t5jax":
            continue  # A lazy import of what lies above would be seen in a cycle of calls.
        below = row(found.name)
        assert below is not None, f"{module} imports {found.name} at its top"
        same = [p for names in ORDER for p in names if is_in(module, p) and is_in(found.name, p)]
        assert below > row(module) or same, f"{module} imports {found.name}, which lies above it"


def test_rooms_of_the_data_side_point_down():
    rows = {room: number for number, rooms in enumerate(DATA_ORDER) for room in rooms}

    def room(module):
        return module.removeprefix(LEAVES).split(".")[1] if module != LEAVES else None

    ours = {m: path for m, path in MODULES.items() if is_in(m, LEAVES) and m != LEAVES}
    assert {room(m) for m in ours} == rows.keys(), "write these into DATA_ORDER"
    for module, path in ours.items():
        for found in imports(path):
            if not is_in(found.name, LEAVES) or room(found.name) == room(module):
                continue
            assert found.name != LEAVES, (
                f"{module} imports from t5jax.data, which is for task files"
            )
            below = rows[room(found.name)] > rows[room(module)]
            assert below, f"{module} imports {found.name}, which is no room below its own"


def test_no_cycle_within_a_row_either():
    graph = {m: {i.name for i in imports(p) if i.name in MODULES} for m, p in MODULES.items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path, module])
        if module in done:
            return
        path.append(module)
        for name in sorted(graph[module]):
            visit(name)
        done.add(path.pop())

    for module in graph:
        if module != "t5jax":  # It looks up the modules above it when a function is called.
            visit(module)


def test_no_test_imports_another():
    tests = list((ROOT / "tests").rglob("*.py"))
    assert len(tests) > 50
    for path in tests:
        for found in imports(path):
            assert "test_" not in found.name, f"{path} imports {found.name}"


def test_models_are_reached_through_their_api():
    for module, path in MODULES.items():
        if not is_in(module, "t5jax.models"):
            for found in imports(path):
                inner = is_in(found.name, "t5jax.models") and found.name != "t5jax.models.api"
                assert not inner, f"{module} imports {found.name}; use t5jax.models.api"


def test_data_is_imported_in_functions():
    for module, path in MODULES.items():
        if not is_in(module, LEAVES):
            for found in imports(path):
                light = is_in(found.name, "t5jax.data.batches")
                heavy = is_in(found.name, LEAVES) and not light
                assert not heavy or found.lazy, f"{module} imports {found.name} at its top"


def test_no_family_is_named_outside_its_own_files():
    """A name is a family's as a string of code (not in a sentence), or its description's class."""
    classes = {family.description.split(".")[1] for family in FAMILIES.values()}
    homes = ["t5jax.architectures", "t5jax.t5x"]
    homes += [f"t5jax.models.{family.network}" for family in FAMILIES.values()]
    tables = [f"t5jax.hf.{family.table}" for family in FAMILIES.values()]
    found = []
    for module, path in MODULES.items():
        if any(is_in(module, home) for home in [*homes, *tables]):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
            named = isinstance(name, str) and name in FAMILIES
            # What several tables of Hugging Face's share is written for one class.
            if isinstance(node, (ast.Name, ast.alias)) and not is_in(module, "t5jax.hf"):
                named = getattr(node, "id", getattr(node, "name", "")) in classes
            if named:
                found.append(f"{module}:{node.lineno}")
    assert not found, "ask `Architecture`, or the table FAMILIES"


@pytest.mark.parametrize(
    ("packages", "home"),
    [
        (("tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio"), "t5jax.data"),
        (("flax.linen",), "t5jax.models"),
    ],
)
def test_packages_stay_at_home(packages, home):
    users = {
        module
        for module, path in MODULES.items()
        for found in imports(path)
        if any(is_in(found.name, package) for package in packages)
    }
    assert users, "the test looks for the wrong name"
    assert all(is_in(user, home) and not is_in(user, "t5jax.data.batches") for user in users)


@pytest.mark.parametrize("package", ["torch", "transformers", "clu", "matplotlib", "tyro"])
def test_packages_that_wait_for_a_function(package):
    for module, path in MODULES.items():
        for found in imports(path):
            assert found.lazy or not is_in(found.name, package), f"{module} imports {package}"


# --- In a process of its own ----------------------------------------------------------------------

BLOCK = """
import sys

BLOCKED = {"tensorflow", "tensorflow_text", "seqio", "tensorflow_datasets", "torch",
           "transformers", "clu"}

class Without:  # A finder that does not find them.
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, *args)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def run_blocked(code, *args):
    return run_python(BLOCK + textwrap.dedent(code), *args).stdout


def test_the_blocker_blocks():
    run_blocked(
        """
        try:
            import tensorflow
        except ImportError:
            sys.exit(0)
        sys.exit(1)
        """
    )


def test_without_tensorflow_torch_and_clu_a_model_is_trained_saved_exported_and_used(tmp_path):
    out = run_blocked(
        """
        from pathlib import Path

        import jax
        import numpy as np

        import t5jax
        from t5jax import checkpoint, sharding
        from t5jax.architectures import T5Config
        from t5jax.batch import pad_ids, shift_right
        from t5jax.config import Config, DataConfig
        from t5jax.convert import export_model
        from t5jax.program import program
        from t5jax.tokenizers import ByteTokenizer

        run_dir = Path(sys.argv[1])
        model = T5Config(vocab_size=384, d_model=16, d_kv=4, d_ff=32, num_heads=4,
                         num_encoder_layers=1, num_decoder_layers=1, scan_layers=False)
        config = Config(model=model, run_dir=str(run_dir), data=DataConfig(batch_size=2))
        run = program(config, sharding.make_mesh())
        targets = pad_ids([[5, 6, 1], [7, 1]], 2, 4)
        batch = {
            "encoder_input_tokens": pad_ids([[3, 4, 1], [9, 1]], 2, 4),
            "decoder_input_tokens": shift_right(targets, 0),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets != 0).astype("float32"),
        }
        with run.use():
            state, metrics = run.step(run.create(jax.random.key(0)), batch)
            assert float(metrics["tokens"]) == 5
            with checkpoint.Checkpoints(run_dir) as checkpoints:
                checkpoints.save(1, state, {"batches": 1}, config)
            ByteTokenizer().save(run_dir / "tokenizer")
            last = checkpoint.latest_checkpoint(run_dir)
            with checkpoint.Checkpoints(run_dir) as checkpoints:
                restored = checkpoints.restore(last, run.shapes, run.shardings)
            jax.tree.map(np.testing.assert_array_equal, restored, state)
        export_model(str(run_dir), str(run_dir / "hf"))
        import t5jax.serving.server
        ours = t5jax.load(str(run_dir)).generate(["abc"], max_tokens=4)
        theirs = t5jax.load(str(run_dir / "hf")).generate(["abc"], max_tokens=4)
        assert ours == theirs
        print("done", ours)
        """,
        tmp_path / "run",
    )
    assert out.startswith("done ['")


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["trian"]])
def test_command_line_answers_without_heavy_imports(args):
    out = run_blocked(
        """
        from t5jax.cli import main

        main(sys.argv[1:])
        heavy = {"jax", "flax", "tyro", "numpy", "rich", "orbax"} & set(sys.modules)
        assert not heavy, heavy
        """,
        *args,
    )
    assert out or args == ["trian"]


def test_help_of_a_command_loads_no_jax():
    out = run_blocked(
        """
        from t5jax.cli import main

        try:
            main(["train", "--help"])
        except SystemExit:
            heavy = {"jax", "flax"} & set(sys.modules)
            assert not heavy, heavy
        """
    )
    assert "--optimizer.learning-rate" in out
