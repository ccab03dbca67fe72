from __future__ import annotations

import pytest

from adaptrain.errors import ConfigurationError
from adaptrain.policies.progress_schedule import progress_schedule

NAMES = ["constant", "cosine", "linear", "wsd"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_stays_in_its_range_warms_up_and_never_rises_again(name, warmup):
    schedule = progress_schedule(name, warmup=warmup)
    values = [schedule(step / 1000) for step in range(1001)]
    peak = round(1000 * warmup)
    assert all(0 <= value <= 1 for value in values)
    assert values[peak] == pytest.approx(1.0)
    assert values[:peak] == sorted(values[:peak])
    assert values[peak:] == sorted(values[peak:], reverse=True)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_an_annealing_schedule_ends_at_zero_and_stays_there(name):
    schedule = progress_schedule(name)
    assert schedule(1.0) == pytest.approx(0.0)
    assert schedule(1.5) == schedule(1.0)
    assert schedule(-0.1) == schedule(0.0) == 0.0


def test_the_shapes_at_known_points():
    assert progress_schedule("linear", warmup=0.2)(0.6) == pytest.approx(0.5)
    assert progress_schedule("cosine", warmup=0.0)(0.5) == pytest.approx(0.5)
    assert progress_schedule("cosine", warmup=0.0)(0.25) == pytest.approx(0.8535533905932737)
    assert progress_schedule("wsd")(0.79) == 1.0
    assert progress_schedule("wsd")(0.9) == pytest.approx(0.5)
    assert progress_schedule("wsd", decay=0.5)(0.75) == pytest.approx(0.5)
    assert progress_schedule("constant")(1.0) == 1.0
    assert progress_schedule("constant", warmup=0.1)(0.05) == pytest.approx(0.5)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ConfigurationError, match=r"'cosin'.*constant, cosine, linear, wsd"):
        progress_schedule("cosin")
    with pytest.raises(ConfigurationError, match=r"warmup.*\[0, 1\).*1"):
        progress_schedule("linear", warmup=1)
    with pytest.raises(ConfigurationError, match="decay"):
        progress_schedule("wsd", warmup=0.5, decay=0.6)
