"""The policies of the global batch size that go by the run's progress alone."""

from __future__ import annotations

import pytest

from adaptrain import BatchSizeRamp, ConfigurationError
from adaptrain.policies.global_batch_size import FixedGlobalBatchSize, global_batch_size_policy

# Ramp ----------------------------------------------------------------------------------------------------------------


def test_a_ramp_doubles_evenly_and_ends_at_its_end():
    assert BatchSizeRamp(begin=32, end=256, until=0.6).plan() == [
        (pytest.approx(0.2), 64),
        (pytest.approx(0.4), 128),
        (pytest.approx(0.6), 256),
    ]
    assert [size for _, size in BatchSizeRamp(begin=10, end=50).plan()] == [20, 40, 50]
    assert BatchSizeRamp(begin=8, end=8).plan() == []


def test_a_ramp_proposes_what_is_due():
    ramp = BatchSizeRamp(begin=4, end=16, until=0.5)
    assert ramp.first(100) == 4
    assert ramp.next(4, progress=0.24, unit=1) is None
    due = ramp.next(4, progress=0.25, unit=1)
    assert due is not None
    assert (due.old, due.new) == (4, 8)
    assert "25%" in due.reason
    # Steps may be long: what was missed is made up for; after the end nothing comes.
    late = ramp.next(4, progress=0.9, unit=1)
    assert late is not None
    assert late.new == 16
    assert ramp.next(16, progress=1.0, unit=1) is None
    assert ramp.first(100) == ramp.sizes["begin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"begin": 0, "end": 4}, "begin must be a whole number"),
        ({"begin": 4, "end": 4.5}, r"end must be a whole number .* got 4\.5"),
        ({"begin": 8, "end": 4}, "end must be at least begin"),
        ({"begin": 4, "end": 8, "until": 0}, "until"),
        ({"begin": 4, "end": 8, "until": True}, "until"),
    ],
)
def test_ramps_that_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        BatchSizeRamp(**arguments)


def test_the_argument_in_all_its_forms():
    assert global_batch_size_policy(None) is None
    assert global_batch_size_policy(64) == FixedGlobalBatchSize(64)
    ramp = BatchSizeRamp(begin=1, end=2)
    assert global_batch_size_policy(ramp) is ramp
    for wrong in (0, True, 2.0, "auto", {"begin": 1}):
        with pytest.raises(ConfigurationError, match="BatchSizeRamp"):
            global_batch_size_policy(wrong)


def test_a_number_is_come_back_to():
    fixed = FixedGlobalBatchSize(64)
    assert fixed.first(8) == 64
    assert fixed.next(64, progress=0.5, unit=1) is None
    back = fixed.next(32, progress=0.5, unit=1)
    assert back is not None
    assert back.new == 64
