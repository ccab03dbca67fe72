"""The search for a structure at its latency limit, on a machine whose noise and whose table's errors are known."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from adaptrain.pruning.latency_search import FITS, NEAR, LatencySearch


class Machine:
    """Measures structures by what the table says of them.

    Args:
        off: By which factor the table is off.
        noise: The standard deviation of a measurement, as a share of it.
        bursts: The share of measurements in which other work made one of the two models slower by a quarter.
        seed: Of all three.
    """

    def __init__(self, *, off: float = 1.0, noise: float = 0.0, bursts: float = 0.0, seed: int = 0) -> None:
        self.off, self.noise, self.bursts = off, noise, bursts
        self.random = random.Random(seed)
        self.calls = 0

    def measure(self, by_table: float) -> float:
        self.calls += 1
        hit = self.random.choice((1.25, 0.8)) if self.random.random() < self.bursts else 1.0
        return by_table * self.off * hit * (1 + self.noise * self.random.gauss(0, 1))

    def settle(self) -> tuple[float, float]:
        """Returns the share of the limit that the chosen structure takes, and the share that it is said to take."""
        search = LatencySearch()
        while (aim := search.next_aim()) is not None:
            candidate = search.add(aim, by_table=aim * (1 - 0.01 * self.random.random()))  # widths come in steps
            while not search.is_decided(candidate):
                candidate.measured.append(self.measure(candidate.by_table))
        best = search.best()
        return best.by_table * self.off, search.used(best)


@pytest.mark.parametrize("off", [0.7, 0.85, 0.92, 1.0, 1.08, 1.3, 1.6])
def test_a_table_that_is_off_by_a_factor_is_corrected_at_once(off: float) -> None:
    machine = Machine(off=off)
    true, said = machine.settle()
    assert NEAR <= true <= FITS
    assert said == pytest.approx(true)
    assert machine.calls <= 12


@pytest.mark.parametrize("off", [0.92, 1.0, 1.08, 1.3])
@pytest.mark.parametrize(("noise", "bursts"), [(0.03, 0.0), (0.08, 0.0), (0.12, 0.0), (0.04, 0.2)])
def test_a_busy_machine_neither_cuts_too_much_nor_too_little(off: float, noise: float, bursts: float) -> None:
    machines = [Machine(off=off, noise=noise, bursts=bursts, seed=seed) for seed in range(200)]
    found = [machine.settle() for machine in machines]
    true = [each for each, _ in found]
    assert 0.92 < fmean(true) < 0.96
    assert sum(each < 0.85 for each in true) <= 8
    assert sum(each > 1.02 for each in true) <= 20
    assert fmean(said / each for each, said in found) == pytest.approx(1.0, abs=0.02)
    assert fmean(machine.calls for machine in machines) < 20


def test_a_single_unlucky_measurement_refuses_no_candidate() -> None:
    search = LatencySearch()
    candidate = search.add(0.95, by_table=0.95)
    candidate.measured.append(1.1)
    assert not search.is_decided(candidate)
    candidate.measured[:] = [1.4]
    assert search.is_decided(candidate)  # so far off is none by chance


def test_what_scatters_more_than_usual_is_measured_more_often() -> None:
    calm, busy = LatencySearch(), LatencySearch()
    for search, size in ((calm, 0.02), (busy, 0.18)):
        search.add(0.94, by_table=0.94).measured.extend(0.94 + off * size for off in (-1, 1, -1, 1, 0))
    assert calm.is_decided(calm.candidates[0])
    assert not busy.is_decided(busy.candidates[0])
    # Another one, as steady as it seems so far, is seen on the same machine.
    busy.add(0.9, by_table=0.75).measured.extend([0.8, 0.8])
    assert not busy.is_decided(busy.candidates[1])


def test_measurements_of_a_structure_that_is_alike_count_where_they_agree() -> None:
    search = LatencySearch()
    search.add(0.95, by_table=0.95).measured.extend([1.05] * 4)
    alike = search.add(0.88, by_table=0.88)
    alike.measured.append(0.98)
    assert search.used(alike) == pytest.approx(0.88 * (4 * 1.05 / 0.95 + 0.98 / 0.88) / 5)
    alike.measured[:] = [0.7]  # a kernel that likes its widths better: what the other one took says nothing
    assert search.used(alike) == pytest.approx(0.7)
    other = search.add(0.6, by_table=0.6)
    other.measured.append(0.66)
    assert search.used(other) == pytest.approx(0.66)  # of the same factor, but far away


def test_what_first_seemed_to_fail_is_chosen_once_others_tell_that_it_fits() -> None:
    search = LatencySearch()
    first = search.add(0.95, by_table=0.95)
    first.measured.extend([1.0, 0.98])
    assert search.used(first) > FITS
    second = search.add(0.87, by_table=0.87)
    second.measured.extend([0.86] * 8)
    assert search.used(first) < FITS
    assert search.best() is first
