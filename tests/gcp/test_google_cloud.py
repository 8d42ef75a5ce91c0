"""Commands against a stand-in of Google Cloud that fails, preempts and takes its time."""

import functools
import os
import re
from pathlib import Path

import pytest

import google_cloud
from gcp import workers
from gcp.__main__ import main
from google_cloud import GoogleCloud

COMMON = """
name = "run"
project = "my-project"
zone = "us-east5-b"
bucket = "my-bucket"
command = "t5jax train my_config"
files = ["my_config.py"]
"""
KINDS = {
    "queued": (COMMON + 'accelerator = "v6e-16"\nprovisioning = "spot"\n', 4),
    "compute": (
        COMMON + 'accelerator = "tpu7x:2x2x2"\nprovisioning = "spot"\n'
        'vm_image = "projects/images/global/images/family/tpu"\n',
        2,
    ),
}
# Two slices, together.
MULTISLICE = 'accelerator = "v6e-16"\nprovisioning = "spot"\nslices = 2\n'
both = pytest.mark.parametrize("kind", KINDS)
SECRETS = "[secrets]\nHF_TOKEN = 'hf-token'\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with a config and prices, where no wheel is built."""
    monkeypatch.chdir(tmp_path)
    Path("my_config.py").touch()
    Path("prices.toml").write_text("date = 2026-01-01\n[v6e]\nus = 2\n[tpu7x]\nus = 3\n")
    monkeypatch.setattr(workers, "build_wheel", lambda folder: (folder / "t5jax-1.whl").touch())
    return tmp_path


def gcp_of_two_slices(cloud: GoogleCloud, command: str, *options: str) -> int:
    Path("run.toml").write_text(COMMON + MULTISLICE)
    return main([command, "run.toml", "--prices", "prices.toml", *options], cloud)


def gcp(cloud: GoogleCloud, kind: str, command: str, *options: str, more: str = "") -> int:
    Path("run.toml").write_text(KINDS[kind][0] + more)
    return main([command, "run.toml", "--prices", "prices.toml", *options], cloud)


def agree(command: str) -> list[str]:
    """What lets a command make what costs money."""
    return ["--yes"] if command in ("create", "watch") else []


def new(kind: str, **options) -> GoogleCloud:
    cloud = GoogleCloud(hosts=KINDS[kind][1], **options)
    assert gcp(cloud, kind, "set-up") == 0
    cloud.calls.clear()
    return cloud


def changes(cloud: GoogleCloud) -> list[list[str]]:
    questions = r"list|list-instances|get-iam-policy|ls|cat|ssh"
    return [c for c in cloud.calls if not any(re.fullmatch(questions, word) for word in c[:6])]


def listed(output: str) -> list[str]:
    """What the list shows that is billed by time."""
    kinds = "TPU VM|queued resource|instance group"
    return sorted(set(re.findall(rf"^  (?:{kinds}) (\S+) ", output.split("money now:")[-1], re.M)))


@both
def test_the_whole_way(kind, place, capsys):
    cloud, hosts = GoogleCloud(hosts=KINDS[kind][1]), KINDS[kind][1]
    run = functools.partial(gcp, cloud, kind)
    assert run("set-up") == run("create", "--yes") == run("install") == run("start") == 0
    assert [host.service for host in cloud.hosts["run"]] == ["running"] * hosts
    assert run("create", "--yes") == run("start") == 0  # Is there, and runs.
    capsys.readouterr()
    assert run("status") == run("log") == 0
    shown = capsys.readouterr().out
    assert shown.count(": running\n") == hosts
    assert "a line of run-w0's log" in shown
    assert run("list") == 0
    shown = capsys.readouterr().out
    assert ("$32.00 an hour" if kind == "queued" else "$12.00 an hour") in shown
    assert run("stop") == 0
    assert {host.service for host in cloud.hosts["run"]} == {"none"}
    assert cloud.costs == ["run"]
    assert run("delete") == run("delete") == 0
    assert cloud.costs == []
    assert {**cloud.templates, **cloud.policies} == {}
    script = cloud.objects["gs://my-bucket/launch/run/run.sh"]
    assert "exec t5jax train my_config --run-dir gs://my-bucket/runs/run" in script
    assert f"export JAX_NUM_PROCESSES={hosts}\n" in script
    assert "gs://my-bucket/launch/run/files/my_config.py" in cloud.objects


@both
def test_what_compute_engine_and_the_queue_are_asked_for(kind, place):
    cloud = new(kind)
    assert gcp(cloud, kind, "create", "--yes") == 0
    made = [" ".join(command) for command in changes(cloud)]
    account = "--service-account=t5jax-runs@my-project.iam.gserviceaccount.com"
    assert all("--project=my-project" in command for command in made)
    if kind == "queued":
        (command,) = made
        assert "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot" in command
        assert account in command
        return
    policy, template, group = made
    assert "workload-policy run --region=us-east5 --type=HIGH_THROUGHPUT" in policy
    assert "--accelerator-topology=2x2x2" in policy
    assert "--machine-type=tpu7x-standard-4t --image-project=images --image-family=tpu" in template
    assert "--provisioning-model=SPOT" in template
    assert account in template
    assert "--size=2 --template=run" in group
    assert "--workload-policy=projects/my-project/regions/us-east5/resourcePolicies/run" in group


@both
def test_a_second_set_up_changes_nothing(kind, place, capsys):
    cloud = GoogleCloud()
    more = "image = 'us-docker.pkg.dev/p/images/t5jax:1'\n" + SECRETS
    assert gcp(cloud, kind, "set-up", more=more) == 0
    first, count = vars(cloud).copy(), len(changes(cloud))
    assert count == 12
    assert {role for bound in cloud.bindings.values() for role in bound} == {
        "roles/storage.objectUser",
        "roles/storage.legacyBucketReader",
        "roles/secretmanager.secretAccessor",
        "roles/artifactregistry.reader",
    }
    assert gcp(cloud, kind, "set-up", more=more) == 0
    assert len(changes(cloud)) == count
    assert "nothing to change" in capsys.readouterr().out
    for name in ("apis", "buckets", "accounts", "bindings"):
        assert vars(cloud)[name] == first[name]


@pytest.mark.parametrize("after", [False, True])
def test_a_set_up_that_failed_goes_on(after, place):
    whole = GoogleCloud()
    assert gcp(whole, "queued", "set-up", more=SECRETS) == 0
    for n in range(1, len(whole.calls) + 1):
        cloud = GoogleCloud()
        cloud.fail_at, cloud.fail_after_effect = {n}, after
        gcp(cloud, "queued", "set-up", more=SECRETS)
        assert gcp(cloud, "queued", "set-up", more=SECRETS) == 0
        for name in ("apis", "buckets", "accounts", "bindings"):
            assert vars(cloud)[name] == vars(whole)[name], n


@both
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("command", ["create", "delete", "install", "start", "stop"])
def test_no_call_that_fails_leaves_behind_what_is_not_listed(command, after, kind, place, capsys):
    def begin() -> GoogleCloud:
        cloud = new(kind)
        if command != "create":
            assert gcp(cloud, kind, "create", "--yes") == 0
        if command in ("start", "stop"):
            assert gcp(cloud, kind, "install") == 0
        cloud.calls.clear()
        capsys.readouterr()
        return cloud

    whole = begin()
    assert gcp(whole, kind, command, *agree(command)) == 0
    for n in range(1, len(whole.calls) + 1):
        cloud = begin()
        cloud.fail_at, cloud.fail_after_effect = {n}, after
        status = gcp(cloud, kind, command, *agree(command))
        output = capsys.readouterr()
        if status == 0:
            assert cloud.costs == whole.costs, n
            continue
        assert "failed with status 1" in output.err
        assert listed(output.out) == cloud.costs, n
        if command == "create":
            assert cloud.costs == [], n
        cloud.fail_at = set()
        assert gcp(cloud, kind, command, *agree(command)) == 0  # The same command goes on.
        assert cloud.costs == whole.costs


def test_what_cannot_be_taken_back_is_listed(place, capsys):
    cloud = new("queued")
    # From the request on nothing answers for a while: it, and three tries to take it back.
    cloud.fail_at, cloud.fail_after_effect = {3, 4, 5, 6}, False
    cloud.on_call = lambda cloud, words: setattr(cloud, "fail_after_effect", "create" in words)
    assert gcp(cloud, "queued", "create", "--yes") == 1
    assert listed(capsys.readouterr().out) == cloud.costs == ["run"]
    cloud.fail_at = set(range(len(cloud.calls), len(cloud.calls) + 100))
    assert gcp(cloud, "queued", "delete") == 1
    said = capsys.readouterr().out
    assert "that could not be asked" in said
    assert "look again: python -m gcp list run.toml" in said


@both
def test_a_run_is_finished_after_preemptions_without_a_person(kind, place, capsys):
    cloud = new(kind)
    # While it waits in the queue, while it installs, and while it trains.
    cloud.preempt_at = [200.0, 700.0, 1700.0]
    assert gcp(cloud, kind, "watch", "--yes") == 0
    assert cloud.is_finished
    assert not cloud.preempt_at
    assert cloud.costs == []
    assert "run is finished" in capsys.readouterr().out
    scripts = {flag for call in cloud.calls for flag in call if "worker.sh start" in flag}
    assert len(scripts) == 1
    uploads = [c for c in cloud.calls if "rsync" in c]
    assert len(uploads) == 1  # One version for all slices.


def test_two_slices_are_one_run(place, capsys):
    cloud = new("queued")
    run = functools.partial(gcp_of_two_slices, cloud)
    assert run("create", "--yes") == run("install") == run("start") == 0
    (made,) = [" ".join(call) for call in changes(cloud) if "create" in call]
    assert "create run --zone=us-east5-b --node-count=2 --node-prefix=run" in made
    assert "--node-id" not in made
    assert ": 32 x $2.00 = $64.00 an hour" in capsys.readouterr().out
    assert "JAX_NUM_PROCESSES=8\n" in cloud.objects["gs://my-bucket/launch/run/run.sh"]
    assert run("status") == run("log", "--worker", "5") == run("list") == 0
    shown = capsys.readouterr().out
    assert shown.count(": running\n") == 8
    assert "a line of run-1-w1's log" in shown
    assert listed(shown) == cloud.costs == ["run-0", "run-1"]
    assert run("delete") == 0
    assert cloud.costs == []


def test_two_slices_of_which_one_is_preempted_are_made_again(place):
    cloud = new("queued")
    cloud.preempt_at = [700.0, 1700.0]
    assert gcp_of_two_slices(cloud, "watch", "--yes") == 0
    assert cloud.is_finished
    assert not cloud.preempt_at
    assert cloud.costs == []
    made = [call for call in cloud.calls if "queued-resources" in call and "create" in call]
    assert len(made) == 3


@both
@pytest.mark.parametrize("after", [False, True])
def test_a_watcher_survives_each_call_that_fails(kind, after, place):
    whole = new(kind)
    whole.preempt_at = [900.0]
    assert gcp(whole, kind, "watch", "--yes") == 0
    calls = len(whole.calls)
    # All of the beginning and the end; in between rounds are alike.
    for n in [*range(4, 30), *range(30, calls - 12, 9), *range(calls - 12, calls + 1)]:
        cloud = new(kind)
        cloud.preempt_at, cloud.fail_at, cloud.fail_after_effect = [900.0], {n}, after
        assert gcp(cloud, kind, "watch", "--yes") == 0, n
        assert cloud.is_finished
        assert cloud.costs == [], n


@both
def test_a_command_that_fails_again_and_again_costs_nothing_in_the_end(kind, place, capsys):
    cloud = new(kind)
    cloud.crash = lambda cloud: True
    assert gcp(cloud, kind, "watch", "--yes", "--restarts", "2") == 1
    output = capsys.readouterr()
    assert "the command failed 3 times in a row" in output.err
    assert f"a line of run-w{KINDS[kind][1] - 1}'s log" in output.out  # Of the host that failed.
    assert "a line of run-w0's log" not in output.out
    assert cloud.costs == listed(output.out) == []


def test_a_command_that_fails_once_is_started_again(place):
    cloud, crashed = new("queued"), []

    def crash(cloud):
        if not crashed and cloud.now > 500:
            crashed.append(cloud.now)
            return True
        return False

    cloud.crash = crash
    assert gcp(cloud, "queued", "watch", "--yes") == 0
    assert crashed
    assert cloud.is_finished


@both
def test_hosts_on_which_nothing_can_be_installed_cost_nothing_in_the_end(kind, place, capsys):
    cloud = new(kind)

    def refuse(cloud, words):
        if any("worker.sh install" in word for word in words):
            cloud.fail_at = {len(cloud.calls)}

    cloud.on_call = refuse
    assert gcp(cloud, kind, "watch", "--yes") == 1
    output = capsys.readouterr()
    assert "two slices could not be installed" in output.err
    assert cloud.costs == listed(output.out) == []


def test_a_watcher_says_what_has_changed_alone(place, capsys):
    assert gcp(new("queued", work=3000.0), "queued", "watch", "--yes") == 0
    said = re.findall(r"^run: ready \(.*?\), (.*)", capsys.readouterr().out, re.MULTILINE)
    assert said == [f"{state} on 4 hosts" for state in ("none", "running", "finished")]


def test_a_file_that_has_changed_is_not_ignored(place, capsys):
    cloud = new("queued")

    def uploads(more: str = "") -> int:
        before = sum("rsync" in call for call in cloud.calls)
        assert gcp(cloud, "queued", "watch", "--yes", more=more) == 0
        return sum("rsync" in call for call in cloud.calls) - before

    assert [uploads(), uploads(), uploads("[env]\nA = '1'\n")] == [1, 0, 1]
    Path("my_config.py").write_text("other = 1\n")
    assert [uploads("[env]\nA = '1'\n"), uploads("[env]\nA = '1'\n")] == [1, 0]


@pytest.mark.parametrize(
    ("kind", "old", "new_one", "message"),
    [
        ("queued", "v6e-16", "v6e-8", "there already, with v6e-16, and the file asks for v6e-8"),
        ("compute", "tpu7x:2x2x2", "tpu7x:1x1x1", "with tpu7x-standard-4t, and the file asks"),
        ("compute", "tpu7x:2x2x2", "tpu7x:2x2x4", "with 2 machines, and the file asks for 4"),
    ],
)
def test_a_slice_of_another_size_is_not_taken_for_the_one(
    kind, old, new_one, message, place, capsys
):
    cloud = new(kind)
    assert gcp(cloud, kind, "create", "--yes") == 0
    Path("run.toml").write_text(KINDS[kind][0].replace(old, new_one))
    assert main(["create", "run.toml", "--prices", "prices.toml", "--yes"], cloud) == 2
    assert message in capsys.readouterr().err
    assert cloud.costs == ["run"]


def test_options_that_would_do_nothing_are_refused(place, capsys):
    cloud = new("queued")
    for words in (["create", "--keep"], ["watch", "--interval", "-1"], ["delete", "--yes"]):
        with pytest.raises(SystemExit):
            gcp(cloud, "queued", *words)
    assert gcp(cloud, "queued", "log", "--worker", "4") == 2
    assert "--worker is 4; run has the hosts 0 to 3" in capsys.readouterr().err
    assert gcp(cloud, "compute", "log", "--worker", "1", "--dry-run") == 0
    assert cloud.calls == []


def test_a_watcher_gives_up_where_google_never_answers(place, capsys):
    cloud = new("queued")
    cloud.fail_at = set(range(6, 10**4))
    assert gcp(cloud, "queued", "watch", "--yes") == 1
    assert "that could not be asked" in capsys.readouterr().out


@both
@pytest.mark.parametrize("command", ["stop", "delete"])
def test_stop_and_delete_end_a_watcher_too(command, kind, place):
    """At any of its calls; what it made in between is gone in the end."""
    for n in range(4, 22):
        cloud = new(kind)
        done = []

        def meanwhile(cloud, words, n=n, done=done):
            if len(cloud.calls) == n and not done:
                done.append(True)
                gcp(cloud, kind, command)

        cloud.on_call = meanwhile
        gcp(cloud, kind, "watch", "--yes")
        assert done
        assert not cloud.is_finished
        if command == "delete":
            assert cloud.costs == [], n


def test_another_watcher_goes_on_where_one_has_ended(place):
    cloud = new("queued")

    class Ended(BaseException):
        pass

    def end(cloud, words):
        if len(cloud.calls) == 25:
            raise Ended

    cloud.on_call = end
    with pytest.raises(Ended):
        gcp(cloud, "queued", "watch", "--yes")
    starts = [c for c in cloud.calls if "--command=bash t5jax/worker.sh start" in c]
    assert gcp(cloud, "queued", "watch", "--yes") == 0
    again = [c for c in cloud.calls if "--command=bash t5jax/worker.sh start" in c]
    assert cloud.is_finished
    assert cloud.costs == []
    assert again == starts != []


def test_nothing_is_made_without_a_price_and_consent(place, capsys):
    cloud = new("queued")
    for command in ("create", "watch"):
        assert gcp(cloud, "queued", command) == 2
        assert "nobody is there to agree to this price; give --yes" in capsys.readouterr().err
        assert gcp(cloud, "queued", command, "--yes", more="max_dollars_per_hour = 31\n") == 2
        assert "costs $32.00 an hour" in capsys.readouterr().err
    Path("prices.toml").write_text("date = 2026-01-01\n")
    assert gcp(cloud, "queued", "create", "--yes") == 2
    assert "has no price of v6e" in capsys.readouterr().err
    assert cloud.calls == []


@both
def test_a_dry_run_asks_nobody(kind, place, capsys):
    cloud = GoogleCloud()
    for command in ("set-up", "create", "install", "start", "log", "status", "watch", "stop"):
        assert gcp(cloud, kind, command, "--dry-run") == 0
        assert "gcloud " in capsys.readouterr().out, command
    assert gcp(cloud, kind, "delete", "--dry-run") == gcp(cloud, kind, "list", "--dry-run") == 0
    assert cloud.calls == []
    assert not Path("build").exists()


@both
def test_secrets_are_in_no_argument_and_no_file(kind, place):
    """Of any command; their values are read by the machines, where nothing is recorded."""
    cloud = GoogleCloud(hosts=KINDS[kind][1])
    more = SECRETS + "[env]\nA = '1'\n"
    steps = ("set-up", "create", "install", "start", "status", "log", "list", "stop", "delete")
    for command in (*steps, "watch"):
        assert gcp(cloud, kind, command, *agree(command), more=more) == 0
    calls = [word for call in cloud.calls for word in call]
    assert not any("HF_TOKEN" in word for word in calls)
    assert not any("versions" in word for word in calls)  # No value is asked for.
    launch = cloud.objects["gs://my-bucket/launch/run/launch.env"]
    assert "SECRET_NAMES=HF_TOKEN=hf-token\n" in launch


def test_tpus_of_other_zones_are_listed(place, capsys):
    cloud = new("queued")
    assert gcp(cloud, "queued", "create", "--yes") == 0
    Path("other.toml").write_text(Path("run.toml").read_text().replace("us-east5-b", "us-east1-d"))
    capsys.readouterr()
    assert main(["list", "other.toml", "--prices", "prices.toml"], cloud) == 0
    shown = capsys.readouterr().out
    assert "TPU VM" not in shown
    assert "TPUs in us-east1-d (--all-zones for others)" in shown
    assert main(["list", "other.toml", "--prices", "prices.toml", "--all-zones"], cloud) == 0
    shown = capsys.readouterr().out
    assert "  TPU VM run (us-east5-b): READY, at most $32.00 an hour" in shown
    assert "(TPUs in all zones" in shown
    asked = [call for call in cloud.calls if "tpu-vm" in call and "--zone=europe-west4-a" in call]
    assert len(asked) == 1
    assert gcp(cloud, "queued", "list", "--all-zones", "--dry-run") == 0
    assert "gcloud compute tpus locations list --format=json" in capsys.readouterr().out


def test_from_a_shell(place, monkeypatch, capsys):
    """gcloud is found on the path, has no terminal, and what it says is shown."""
    cloud = GoogleCloud(hosts=4)
    for name, value in google_cloud.install(place / "bin", cloud).items():
        monkeypatch.setenv(name, value)
    run = functools.partial(gcp, None, "queued")
    assert run("set-up") == run("create", "--yes", "--interval", "0") == run("list") == 0
    assert "TPU VM run (us-east5-b): READY, at most $32.00 an hour" in capsys.readouterr().out
    assert google_cloud.load(Path(os.environ[google_cloud.STATE])).costs == ["run"]
    (place / "bin" / "gcloud").unlink()
    monkeypatch.setenv("PATH", str(place / "bin"))
    assert run("list") == 1
    assert "gcloud: No such file or directory; is it installed?" in capsys.readouterr().err
