"""How what a user gave wrongly is told."""

import math

import pytest

from t5jax.checks import check_at_least, check_choice, check_positive, did_you_mean


def test_the_nearest_is_named_and_nothing_where_none_is_near():
    assert did_you_mean("trian", ["eval", "train"]) == "did you mean train? "
    assert did_you_mean("tain", ["rain", "train", "eval"], most=2) == "did you mean train or rain? "
    assert did_you_mean(3, [31]) == "did you mean 31? "
    assert did_you_mean("trian", ["eval", "cache"]) == ""


def test_a_choice():
    check_choice("b", ("a", "b"), "x")
    with pytest.raises(
        ValueError, match=r"^x is 'lon'; expected one of long, short; .*mean long\?$"
    ):
        check_choice("lon", ("long", "short"), "x")
    with pytest.raises(ValueError, match="^x is None; expected one of long, short$"):
        check_choice(None, iter(("long", "short")), "x")


def test_bounds():
    check_at_least(1, 1, "x")
    with pytest.raises(ValueError, match="^x is 0; it must be at least 1$"):
        check_at_least(0, 1, "x")
    with pytest.raises(ValueError, match="^x is nan; it must be at least 0$"):
        check_at_least(math.nan, 0, "x")
    check_positive(0.1, "x")
    for value in (0, math.nan):
        with pytest.raises(ValueError, match=f"^x is {value}; it must be above 0$"):
            check_positive(value, "x")
