"""Commands of t5jax, run in this process: a process of its own would import TensorFlow anew."""

from t5jax.cli import main


def run(capsys, *args):
    """Runs a command; returns its exit status and what it wrote to each stream."""
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as error:  # tyro's own answer to options that it cannot read.
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err


def fails(capsys, *args) -> str:
    """Runs a command that must fail; returns its message, on one line."""
    status, out, err = run(capsys, *args)
    assert status not in (0, None)
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.replace("│", " ").split())
