"""Requests of every wrong kind to a server of t5jax, made by schemathesis from its own description.

No answer may have a status of 500 or above, nor one that /openapi.json does not list, and at the
end no slot may be taken. Needs `pip install schemathesis`.

    python benchmarks/fuzz.py [--max-examples 50]
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from stress import busy_slots, server, write_models

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-examples", type=int, default=50, help="for each kind of request")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        with server(Path(folder)) as (_, url):
            command = ["schemathesis", "run", f"{url}/openapi.json", "--checks", CHECKS]
            command += ["--max-examples", str(args.max_examples), "--continue-on-failure"]
            command += ["--request-timeout", "60", "--phases", "examples,coverage,fuzzing"]
            status = subprocess.run(command).returncode
            if busy := busy_slots(url):
                raise SystemExit(f"slots are lost: {busy}")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
