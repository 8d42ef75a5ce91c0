"""Lets the gcloud CLI of this machine parse every command that gcp/ may run: `make gcp-flags`.

Nothing is sent to Google. That a command parses says that its flags exist, not that it works.
"""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from gcp.__main__ import COMMANDS, main

RUNS = {
    "queued": 'accelerator = "v6e-16"\nprovisioning = "spot"\nmax_wait = "6h"\n',
    "reserved": 'accelerator = "v5p-64"\nprovisioning = "reserved"\nnetwork = "n"\n',
    "compute": 'accelerator = "tpu7x:2x2x2"\nprovisioning = "spot"\nsubnetwork = "s"\n'
    'vm_image = "projects/p/global/images/family/f"\n',
    "image": 'accelerator = "v6e-16"\nprovisioning = "reserved"\nreservation = "r"\n'
    'backend = "compute"\nvm_image = "projects/p/global/images/i"\n'
    'image = "us-docker.pkg.dev/p/images/t5jax:1"\n[secrets]\nHF_TOKEN = "hf-token"\n',
}
PRICES = "date = 2026-01-01\n" + "".join(f"[{g}]\nus = 1\n" for g in ("v5p", "v6e", "tpu7x"))


def commands(folder: Path) -> list[str]:
    """Returns what the dry runs of all commands print."""
    (folder / "prices.toml").write_text(PRICES)
    common = 'project = "my-project"\nzone = "us-east5-a"\nbucket = "b-t5jax"\n'
    output = io.StringIO()
    for name, rest in RUNS.items():
        file = folder / f"{name}.toml"
        file.write_text(f'name = "{name}"\ncommand = "t5jax train c"\n{common}{rest}')
        for command in COMMANDS:
            with contextlib.redirect_stdout(output):
                prices = ["--prices", str(folder / "prices.toml")]
                assert main([command, str(file), "--dry-run", *prices]) == 0
    return sorted({line for line in output.getvalue().splitlines() if line.startswith("gcloud ")})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = commands(Path(name))
        file = Path(name) / "commands.json"
        file.write_text(json.dumps([{"command_string": command} for command in found]))
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"]
        done = subprocess.run(lint, capture_output=True, text=True, check=True)
    failed = [result for result in json.loads(done.stdout) if not result["success"]]
    for result in failed:
        print(result["command_string"], result["error_message"], sep="\n  ")
    print(f"{len(found) - len(failed)} of {len(found)} commands are as gcloud has them")
    sys.exit(bool(failed))
