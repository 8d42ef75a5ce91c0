"""What a smaller model gains and costs, in words."""

from t5jax.tradeoff import Tradeoff


def test_it_says_what_is_lost_and_that_there_is_no_gain():
    comparison = {"difference": -1.5, "interval": [-2.0, -0.5], "verdict": "worse"}
    quality = {"t": {"model": {"em": 90.0}, "comparisons": {"runs/x": {"em": comparison}}}}
    found = Tradeoff((4_000_000, 1_000_000), (4_000_000, 1_040_000), quality, (10.0, 9.0))
    assert list(found.lines()) == [
        "in memory, float32: 4.00 MB before, 1.00 MB after, 25.0%",
        "on disk: 4.00 MB before, 1.04 MB after, 26.0%",
        "t em: 90, against the model before -1.5 [-2, -0.5], worse",
        "speed here: 10.0 examples/s before, 9.0 after: no gain (0.90 times)",
    ]
    *_, speed = Tradeoff((4, 1), (4, 1), {}, (10.0, 15.0)).lines()
    assert speed.endswith("1.50 times as fast")
