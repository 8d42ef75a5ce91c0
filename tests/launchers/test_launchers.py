"""What starts t5jax elsewhere: the container, and the files for GKE, SkyPilot and SLURM."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from container import instructions, run_steps
from t5jax.cli import START_AGAIN
from t5jax.commands.serve import Serve

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
TRAIN = yaml.safe_load((LAUNCHERS / "gke/train/jobset.yaml").read_text())
DEPLOYMENT = yaml.safe_load((LAUNCHERS / "gke/serve/deployment.yaml").read_text())


def built(folder: str) -> list[dict]:
    """Returns the manifests that kustomize makes of a folder."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl, whose kustomize builds the manifests, is not here")
    command = ["kubectl", "kustomize", str(LAUNCHERS / "gke" / folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def check(model: str, manifest: dict) -> None:
    """Holds a manifest against Kubernetes' and JobSet's descriptions: no field is unknown."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = copy.deepcopy(manifest)
    without_mixed_types(manifest)
    known = getattr(models, model).model_validate(manifest)
    known = known.model_dump(by_alias=True, exclude_none=True)
    assert list(unknown(manifest, known)) == []


def without_mixed_types(value) -> None:
    """Takes out quantities and named ports, which the descriptions do not have as texts."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            without_mixed_types(item)
    if isinstance(value, dict) and "limits" in value:
        value["limits"] = {}
    if isinstance(value, dict) and "httpGet" in value:
        value["httpGet"]["port"] = {}


def unknown(given, known, path=""):
    if isinstance(given, dict):
        for key, value in given.items():
            if key in known:
                yield from unknown(value, known[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(given, list):
        for number, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from unknown(one, other, f"{path}[{number}]")


def test_the_jobset_is_one():
    check("JobsetV1alpha2JobSet", TRAIN)
    wrong = copy.deepcopy(TRAIN)
    wrong["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(AssertionError, match="maxRestart"):
        check("JobsetV1alpha2JobSet", wrong)


@pytest.mark.parametrize(("folder", "slices"), [("train", 1), ("multislice", 2)])
def test_a_run_on_gke_has_as_many_processes_as_hosts(folder, slices):
    (jobset,) = [m for m in built(folder) if m["kind"] == "JobSet"]
    (config,) = [m for m in built(folder) if m["kind"] == "ConfigMap"]
    check("JobsetV1alpha2JobSet", jobset)
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(sides[0]) * int(sides[1])
    hosts = chips // int(container["resources"]["limits"]["google.com/tpu"])
    assert job["replicas"] == slices
    assert job["template"]["spec"]["parallelism"] == hosts
    assert job["template"]["spec"]["completions"] == hosts
    assert config["data"]["JAX_NUM_PROCESSES"] == str(hosts * slices)
    # The names that kustomize does not follow into what is not Kubernetes' own.
    assert container["envFrom"][0]["configMapRef"]["name"] == config["metadata"]["name"]
    assert container["image"].startswith("us-docker.pkg.dev/")
    variables = {word[2:-1] for word in container["args"] if word.startswith("$(")}
    assert variables <= config["data"].keys()


def test_preemptions_do_not_count_as_failures():
    policy = TRAIN["spec"]["failurePolicy"]
    (job,) = TRAIN["spec"]["replicatedJobs"]
    asked, rule = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert asked == {
        "action": "FailJob",
        "onExitCodes": {"operator": "In", "values": [START_AGAIN]},
    }
    # The job then fails with the reason PodFailurePolicy, which the rule of the JobSet names.
    assert rule["action"] == "FailJob"
    assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert job["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_the_server_on_gke_is_told_when_it_may_begin_and_end():
    spec = DEPLOYMENT["spec"]
    check("IoK8sApiCoreV1PodTemplateSpec", spec["template"])
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    options = dict(a[2:].split("=") for a in container["args"] if a.startswith("--"))
    assert {name.replace("-", "_") for name in options} <= set(Serve.__dataclass_fields__)
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + float(options["drain-seconds"])
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert str(container["ports"][0]["containerPort"]) == options["port"]
    service = yaml.safe_load((LAUNCHERS / "gke/serve/service.yaml").read_text())
    assert service["spec"]["selector"] == spec["selector"]["matchLabels"]
    monitoring = yaml.safe_load((LAUNCHERS / "gke/serve/monitoring.yaml").read_text())
    assert monitoring["spec"]["selector"] == spec["selector"]
    # A secret of kubectl's, of which no value is here.
    assert pod["volumes"][0]["secret"]["secretName"] == "t5jax-keys"
    assert {m["kind"] for m in built("serve")} >= {"Deployment", "Service", "PodMonitoring"}


def test_skypilot_parses_its_file():
    """With SkyPilot's own Python: T5JAX_SKYPILOT=/path/to/its/python."""
    python = os.environ.get("T5JAX_SKYPILOT")
    if python is None:
        pytest.skip("SkyPilot's pins do not fit ours: T5JAX_SKYPILOT names the Python that has it")
    code = (
        "import json, sys, yaml, sky\n"
        "config = yaml.safe_load(open(sys.argv[1]))\n"
        "task = sky.Task.from_yaml_config(config, [('BUCKET', 'b')])\n"
        "(r,) = task.resources\n"
        "print(json.dumps([task.name, r.accelerators, r.use_spot, r.job_recovery, task.envs]))"
    )
    command = [python, "-c", code, str(LAUNCHERS / "skypilot.yaml")]
    env = os.environ | {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, accelerators, spot, recovery, envs = json.loads(done.stdout.splitlines()[-1])
    assert (name, accelerators, spot) == ("t5jax", {"tpu-v6e-8": 1}, True)
    assert recovery["max_restarts_on_errors"] == 3
    assert envs["BUCKET"] == "b"


def test_skypilots_file_is_one_of_this_checkout():
    task = yaml.safe_load((LAUNCHERS / "skypilot.yaml").read_text())
    assert task["envs"]["BUCKET"] is None  # To be given.
    for name in re.findall(r"constraints/\S+", task["setup"]):
        assert (ROOT / name).exists()
    programs = Path(sys.executable).parent
    for part in ("setup", "run"):
        script = f"#!/usr/bin/env bash\n{task[part]}"
        options = ["-e", "SC2154"]
        done = subprocess.run([programs / "shellcheck", *options, "-"], input=script, text=True)
        assert done.returncode == 0


def test_slurm_starts_a_process_for_each_node(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$JAX_NUM_PROCESSES: $*"\n')
    (tmp_path / "srun").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "2"}
    script = ["bash", LAUNCHERS / "slurm.sbatch"]
    words = ["t5_pretrain:base", "gs://b/runs/a b", "--train.steps", "5"]
    done = subprocess.run([*script, *words], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "2: --kill-on-bad-exit=1 t5jax train t5_pretrain:base --run-dir gs://b/runs/a b "
        "--train.steps 5\n"
    )
    assert subprocess.run([*script, "one"], env=env, capture_output=True).returncode == 2
    text = script[1].read_text()
    assert "#SBATCH --ntasks-per-node=1\n" in text
    assert "#SBATCH --requeue\n" in text


@pytest.mark.parametrize(("status", "queued"), [(75, "requeue 7\n"), (1, ""), (0, "")])
def test_slurm_queues_a_run_again_that_was_asked_to_stop(tmp_path, status, queued):
    assert START_AGAIN == 75
    for name, line in (("srun", f"exit {status}"), ("scontrol", 'echo "$*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    env = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", LAUNCHERS / "slurm.sbatch", "quickstart", "runs/a"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, queued)


# --- The container --------------------------------------------------------------------------------


def test_the_container_is_made_of_this_checkout_and_its_lock_file():
    found = instructions()
    known = {"FROM", "ARG", "COPY", "RUN", "ENV", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in found} <= known
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for words in (words.split() for name, words in found if name == "COPY"):
        for source in words[:-1]:
            if not words[0].startswith("--from="):
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, source
    (install,) = [words for name, words in found if name == "RUN" and "pip install" in words]
    assert "--constraint /src/constraints.txt" in install
    extras = set(re.findall(r"extras=([\w,]+)", install)[0].split(",")) | {"tpu", "gpu"}
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", pyproject, re.MULTILINE) for extra in extras)
    (user,) = [words for name, words in found if name == "USER"]
    assert user not in ("root", "0")
    names = [name for name, _ in found]
    assert "RUN" not in names[names.index("USER") :]
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", (ROOT / "Dockerfile").read_text())


def test_the_steps_of_the_container_are_clean_shell_and_refuse_what_they_do_not_know():
    steps = [words for name, words in instructions() if name == "RUN"]
    for step in steps:
        script = f"#!/bin/sh\nACCELERATOR=cpu\n{step}\n"
        programs = Path(sys.executable).parent
        command = [programs / "shellcheck", "-e", "SC2194,SC2050,SC2034", "-"]
        assert subprocess.run(command, input=script, text=True).returncode == 0
    check_name = steps[0].partition("&& python -m venv")[0]
    for name, expected in (("tpu", "serve,gcs,tpu"), ("cpu", "serve,gcs")):
        shell = ["sh", "-c", f"{check_name}\necho $extras"]
        env = {"ACCELERATOR": name}
        assert subprocess.run(shell, env=env, capture_output=True, text=True).stdout == (
            f"{expected}\n"
        )
    shell = subprocess.run(
        ["sh", "-c", check_name], env={"ACCELERATOR": "xpu"}, capture_output=True
    )
    assert shell.returncode == 1


PYTHON = """#!/bin/sh
# Makes an environment whose programs say what they are given.
[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" || exit 1
for name in pip t5jax; do
  printf '#!/bin/sh\necho "%s $*" >>"$HOME/said"\necho "%s $*"\n' $name $name >"$3/bin/$name"
  chmod +x "$3/bin/$name"
done
"""


@pytest.mark.parametrize("accelerator", ["cpu", "tpu"])
def test_the_steps_of_the_container_run_in_order_in_an_empty_folder(accelerator, tmp_path):
    """With the network, tests/container.py does so with a real Python."""
    python, folder = tmp_path / "python", tmp_path / "image"
    python.write_text(PYTHON)
    python.chmod(0o755)
    assert run_steps(folder, str(python), accelerator) == "t5jax --help\n"
    install, version, _ = (folder / "said").read_text().splitlines()
    extras = "serve,gcs" + (",tpu" if accelerator == "tpu" else "")
    assert install.endswith(f"--constraint {folder}/src/constraints.txt {folder}/src[{extras}]")
    assert version == "t5jax --version"
    assert {path.name for path in (folder / "src").iterdir()} == {
        "constraints.txt", "pyproject.toml", "README.md", "LICENSE", "t5jax", "tasks", "configs",
    }  # fmt: skip
    assert (folder / "src/tasks/numbers.py").is_file()
    with pytest.raises(subprocess.CalledProcessError):
        run_steps(tmp_path / "other", str(python), "xpu")


def test_dataflows_image_has_the_versions_of_its_python():
    """Those of the same Python as the image, and Beam's in the image as in the lock file."""
    text = (LAUNCHERS / "dataflow.Dockerfile").read_text()
    version, beam = re.search(r"^FROM apache/beam_python3\.(\d+)_sdk:(\S+)$", text, re.M).groups()
    lock = f"constraints/py3{version}.txt"
    assert f"COPY {lock} /src/constraints.txt" in text
    assert f"apache-beam=={beam}\n" in (ROOT / lock).read_text()
    copied = set(re.findall(r"^COPY (.*) \S+$", text, re.M))
    of_the_other = {w.rpartition(" ")[0] for n, w in instructions() if n == "COPY"}
    assert copied - {lock} == {x for x in of_the_other if x[0] != "-"} - {"constraints/py312.txt"}
