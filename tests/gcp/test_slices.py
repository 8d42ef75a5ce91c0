"""Names of TPU slices, the settings of a run, and what it costs."""

import datetime
from pathlib import Path

import pytest

from gcp import backends, prices, settings, slices

EXAMPLE = Path(__file__).parents[2] / "gcp" / "example.toml"
GOOD = """
name = "run"
project = "my-project"
zone = "us-east5-b"
bucket = "my-bucket"
accelerator = "v6e-16"
command = "t5jax train quickstart"
"""


def load(tmp_path: Path, *lines: str, good: str = GOOD) -> settings.Settings:
    (tmp_path / "run.toml").write_text(good + "\n".join(lines))
    return settings.load(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "accelerator_type", "machine"),
    # By Google's tables: v4 and v5p count two cores a chip, v5e and v6e chips.
    [
        ("v4-8", 4, 1, "v4-8", ""),
        ("v5litepod-8", 8, 1, "v5litepod-8", "ct5lp-hightpu-8t"),
        ("v5litepod-16", 16, 4, "v5litepod-16", "ct5lp-hightpu-4t"),
        ("v5e:1x1", 1, 1, "v5litepod-1", "ct5lp-hightpu-1t"),
        ("v5p-128", 64, 16, "v5p-128", "ct5p-hightpu-4t"),
        ("v5p:4x4x4", 64, 16, "v5p-128", "ct5p-hightpu-4t"),
        ("v6e-256", 256, 64, "v6e-256", "ct6e-standard-4t"),
        ("tpu7x:1x1x1", 1, 1, "-2", "tpu7x-standard-1t"),
        ("tpu7x:2x2x2", 8, 2, "-16", "tpu7x-standard-4t"),
    ],
)
def test_a_name_says_chips_and_hosts(name, chips, hosts, accelerator_type, machine):
    found = slices.parse(name)
    assert (found.chips, found.hosts) == (chips, hosts)
    assert (found.accelerator_type, found.machine_type) == (accelerator_type, machine)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v6e-12", "v6e has v6e-1, v6e-4, v6e-8, v6e-16"),
        ("v5p:4x4x5", "v5p has v5p:2x2x1"),
        ("v9-8", "v9 is none of v4, v5e"),
        ("tpu7x-16", "say the shape of the slice, such as tpu7x:2x2x2"),
        ("eight", "expected a slice such as v5litepod-8"),
    ],
)
def test_what_is_no_slice_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        slices.parse(name)


def test_zones_for_accelerators_alone_are_zones(tmp_path):
    s = load(tmp_path, good=GOOD.replace("us-east5-b", "us-central1-ai1a"))
    assert s.region == "us-central1"


def test_the_example_is_a_run():
    s = settings.load(EXAMPLE)
    assert s.slice.chips == 8
    assert s.region == "us-west4"
    assert s.argv[-2:] == ["--run-dir", "gs://my-project-1234-t5jax/runs/t5-base"]
    backends.choose(s)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['name = "Run"'], "name is 'Run'; expected up to 39 small letters"),
        (['zone = "us-east5"'], "zone is 'us-east5'; expected a zone, such as us-east5-b"),
        (['bucket = "gs://b"'], "bucket is 'gs://b'; expected a bucket's name without gs://"),
        (['project = ""'], "project must be set; nothing is taken from gcloud's configuration"),
        (['zone = ""', 'bucket = ""'], "zone and bucket must be set"),
        (['provisoning = "spot"'], "provisoning is no field; known are name, project"),
        (['provisioning = "preemptible"'], "expected on-demand, spot or reserved"),
        (["files = 'a'"], "files is 'a'; expected a list of texts"),
        (["files = ['../a']"], "files has '../a'; expected what lies in"),
        (["files = ['.']"], "files has '.'; expected what lies in"),
        (["command = ' '"], "command is empty; expected one"),
        (["max_dollars_per_hour = 0"], "expected a number above 0"),
        (["slices = 0"], "slices is 0; expected a whole number, at least 1"),
        (["slices = true"], "slices is True; expected a whole number"),
        (["command = 't5jax train q --run-dir runs/a'"], "runs/a, which is lost with the machine"),
        (["command = 't5jax train q --run-dir=a'"], "--run-dir a, which is lost"),
        (['command = "a \'b"'], "No closing quotation"),
        (["env = {HF_TOKEN = 'x'}"], "env.HF_TOKEN looks like a secret"),
        (["env = {A = 'hf_abcdefghijklmnopqrst'}"], "env.A looks like a secret"),
        (["command = 'a --token hf_abcdefghijklmnopqrst'"], "command holds what looks like"),
        (["secrets = {A = 'hf_abcdefghijklmnopqrst'}"], "keep the value in Secret Manager"),
        (["env = {'A B' = 'x'}"], "'A B' is no name of an environment variable"),
        (["name = ["], "run.toml is no TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(lines, message, tmp_path):
    names = {line.partition(" ")[0] for line in lines}
    kept = [line for line in GOOD.splitlines() if line.partition(" ")[0] not in names]
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, *lines, good="\n".join(kept) + "\n")
    assert "hf_abc" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['accelerator = "tpu7x:2x2x2"', 'backend = "queued"'],
            "queued resources have no tpu7x: it only exists on Compute Engine and GKE; "
            'set backend = "compute", or leave it out',
        ),
        (['accelerator = "tpu7x:2x2x2"'], "gcloud compute images list --project=ubuntu"),
        (['accelerator = "v4-8"', 'backend = "compute"'], "Compute Engine has no v4"),
        (
            [
                'accelerator = "tpu7x:2x2x2"',
                "slices = 2",
                'vm_image = "projects/p/global/images/i"',
            ],
            "slices is 2, and backend compute has one",
        ),
        (['accelerator = "v6e-8"', 'reservation = "r"'], "reservation has no effect on"),
        (
            ['accelerator = "tpu7x:2x2x2"', 'max_wait = "6h"'],
            "max_wait has no effect on backend compute",
        ),
    ],
)
def test_a_backend_that_does_not_fit_is_refused(lines, message, tmp_path):
    s = load(tmp_path, *lines, good=GOOD.replace('accelerator = "v6e-16"\n', ""))
    with pytest.raises(ValueError, match=message):
        backends.choose(s)


PRICES = """
date = {date}
[v6e]
us = 2.5
us-east5 = 3
spot.us = 1
[v5p]
us = 4
"""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "16 x $3.00 = $48.00 an hour, $1,152.00 a day (on demand; prices of 2026"),
        (['provisioning = "spot"'], "16 x $1.00 = $16.00 an hour, $384.00 a day (spot"),
    ],
)
def test_a_cost_has_the_date_of_its_prices(lines, expected, tmp_path):
    (tmp_path / "p.toml").write_text(PRICES.format(date="2026-01-02"))
    assert expected in prices.load(tmp_path / "p.toml").estimate(load(tmp_path, *lines))


def test_spot_without_a_price_costs_at_most_as_on_demand(tmp_path):
    (tmp_path / "p.toml").write_text(PRICES.format(date=datetime.date.today()))
    s = load(tmp_path, 'provisioning = "spot"', good=GOOD.replace("v6e-16", "v5p-16"))
    text = prices.load(tmp_path / "p.toml").estimate(s)
    assert "8 x $4.00 = $32.00 an hour" in text
    assert "(at most, as on demand" in text
    assert "is old" not in text


def test_prices_that_are_unknown_too_high_or_old_are_told(tmp_path):
    (tmp_path / "p.toml").write_text(PRICES.format(date="2020-01-01"))
    table = prices.load(tmp_path / "p.toml")
    assert "p.toml, which is old: compare them" in table.estimate(load(tmp_path))
    with pytest.raises(ValueError, match=r"\$48.00 an hour .* max_dollars_per_hour is 47"):
        table.estimate(load(tmp_path, "max_dollars_per_hour = 47"))
    with pytest.raises(ValueError, match="has no price of v6e in asia-northeast1; look it up"):
        table.estimate(load(tmp_path, good=GOOD.replace("us-east5-b", "asia-northeast1-b")))
    for text, message in (
        ("[v6e]\nus = 1", "date is None"),
        ("date = 2026-01-01T10:00:00\n[v6e]\nus = 1", "expected a day"),
        ("date = 2026-01-01\n[a]\nb = '1'", "a.b is '1'"),
        ("date = 2026-01-01\n[a]\nb = nan", "a.b is nan"),
        ("date = 2026-01-01\nv6e = 3", "v6e is 3; expected prices by region"),
        ("date = 2026-01-01\nv6e.spot = 3", "v6e.spot is 3; expected prices by region"),
    ):
        (tmp_path / "p.toml").write_text(text)
        with pytest.raises(ValueError, match=message):
            prices.load(tmp_path / "p.toml")


def test_the_shipped_prices_have_each_generation_that_is_rented_by_the_hour():
    table = prices.load()
    assert {"v4", "v5e", "v5p", "v6e"} <= table.table.keys()
    assert table.date <= datetime.date.today()
