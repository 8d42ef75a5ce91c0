"""kill -9 at named points: the same command goes on, and ends as one that was not killed.

`make test-faults` kills many more times, at random (`tests/faults/long.py`).
"""

import pytest

import tiny
from faults.killing import at_point, check, commands, run
from tiny import one_device, trained_run  # noqa: F401


@pytest.fixture(scope="module")
def all_commands(tmp_path_factory):
    source = trained_run(tmp_path_factory.mktemp("source") / "run")
    return commands(source, tiny.TASK_FILE)


@pytest.fixture(scope="module")
def whole(all_commands, tmp_path_factory):
    """Returns the folder of a command that was not killed, by the command's name."""
    folders = {}

    def find(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            run(all_commands[name].args(folders[name]))
        return folders[name]

    return find


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "places"),
    [
        (
            "train",
            [
                ("jax._src.compiler:compile_or_get_cached", 3),  # Compiling.
                ("t5jax.train.reports:Reports.add", 3),  # In a step.
                ("t5jax.checksums:write", 1),  # In an asynchronous save, all but whole.
                ("os:rmdir", 1),  # In an old checkpoint that is being deleted.
                ("t5jax.monitor.plot:plot_losses", 1),  # At the end.
            ],
        ),
        ("cache", [("t5jax.storage:os.replace", 1), ("t5jax.storage:sync", 1)]),
        ("export", [("t5jax.storage:os.replace", 1)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_killed_at_a_point_the_same_command_goes_on(name, places, all_commands, whole, tmp_path):
    command, kills = all_commands[name], []
    args = command.args(tmp_path)
    for place in places:
        kills.append(is_killed(args, place))
    run(args)
    assert all(kills), f"never called: {[p for p, k in zip(places, kills, strict=True) if not k]}"
    command.same(whole(name), tmp_path)


def is_killed(args, place) -> bool:
    """Starts a command to be killed; returns whether it was."""
    ended = at_point(*place)(args)
    if ended.status != -9:
        check(ended, args)
    return ended.status == -9
