from __future__ import annotations

import itertools
import random

import pytest

from adaptrain.pruning import structure as structures
from adaptrain.pruning.cost_table import CostTable
from adaptrain.pruning.families import find_family
from adaptrain.pruning.solver import solve
from tests.toys import tiny_bert

ROUND = {"heads": 1, "ffn": 8}


@pytest.fixture(scope="module")
def table() -> CostTable:
    built = CostTable.build(find_family(tiny_bert()), ("heads", "ffn"), (4, 16), latency=False)
    state = dict(built.state)
    # A device on which narrow layers cost as much as half a layer: latency falls in steps, and only at the end to 0.
    points = {"heads": [[0, 0.0], [1, 2.0], [2, 2.0], [4, 4.0]], "ffn": [[0, 0.0], [8, 3.0], [32, 3.0], [64, 6.0]]}
    state["latency"] = [points, points]
    state["fixed"] = {**state["fixed"], "latency": 1.0}
    return CostTable(state)


def dense() -> list[dict[str, list[int]]]:
    return [{"heads": list(range(4)), "ffn": list(range(64))} for _ in range(2)]


def random_scores(seed: int) -> list[dict[str, list[float]]]:
    draw = random.Random(seed)
    return [
        {"heads": [draw.random() * 10 for _ in range(4)], "ffn": [draw.random() for _ in range(64)]} for _ in range(2)
    ]


def loss(structure, scores) -> float:
    return sum(
        score
        for layer, kept in zip(scores, structure, strict=True)
        for kind, values in layer.items()
        for unit, score in enumerate(values)
        if unit not in set(kept[kind])
    )


@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("names", [["params"], ["flops"], ["memory"], ["latency"], ["params", "flops", "latency"]])
def test_every_limit_is_met_and_widths_are_rounded(table, names, fraction) -> None:
    limits = {name: table.least[name] + fraction * (table.dense[name] - table.least[name]) for name in names}
    kept = solve(dense(), random_scores(0), table, limits, ROUND)
    total = table.total(structures.widths(kept))
    assert all(total[name] <= limit for name, limit in limits.items())
    assert all(len(layer["ffn"]) % 8 == 0 for layer in kept)
    assert kept != dense()


def test_it_keeps_the_best_units_of_each_layer(table) -> None:
    scores = random_scores(1)
    kept = solve(dense(), scores, table, {"params": 0.6 * table.dense["params"]}, ROUND)
    for layer, values in zip(kept, scores, strict=True):
        for kind, units in layer.items():
            best = sorted(range(len(values[kind])), key=lambda unit, v=values[kind]: -v[unit])[: len(units)]
            assert units == sorted(best)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["flops", "latency", "memory"])
def test_it_is_near_the_best_of_all_structures(table, name, seed) -> None:
    scores = random_scores(seed)
    limit = {name: table.least[name] + 0.5 * (table.dense[name] - table.least[name])}
    ranked = [{kind: sorted(range(len(v)), key=lambda u, v=v: -v[u]) for kind, v in layer.items()} for layer in scores]
    best = min(
        loss([{"heads": r["heads"][:h], "ffn": r["ffn"][:f]} for r, (h, f) in zip(ranked, widths, strict=True)], scores)
        for widths in itertools.product(itertools.product(range(5), range(0, 65, 8)), repeat=2)
        if table.total([{"heads": h, "ffn": f} for h, f in widths])[name] <= limit[name]
    )
    found = loss(solve(dense(), scores, table, limit, ROUND), scores)
    assert best <= found <= 1.15 * best  # one head more or less is that much in a model this small


def test_nothing_comes_back_and_nothing_needless_goes(table) -> None:
    scores = random_scores(2)
    first = solve(dense(), scores, table, {"flops": 0.6 * table.dense["flops"]}, ROUND)
    again = solve(first, random_scores(3), table, {"flops": 0.5 * table.dense["flops"]}, ROUND)
    for before, after in zip(first, again, strict=True):
        assert all(set(after[kind]) <= set(before[kind]) for kind in before)
    assert solve(first, scores, table, {"flops": 0.7 * table.dense["flops"]}, ROUND) == first


def test_the_least_is_everything_gone(table) -> None:
    kept = solve(dense(), random_scores(4), table, dict(table.least), ROUND)
    assert structures.widths(kept) == [{"heads": 0, "ffn": 0}] * 2


def test_worthless_units_go_first(table) -> None:
    scores = random_scores(5)
    scores[1] = {kind: [0.0] * len(values) for kind, values in scores[1].items()}
    kept = solve(dense(), scores, table, {"params": 0.75 * table.dense["params"]}, ROUND)
    assert kept[0] == dense()[0]


def test_a_width_that_is_no_multiple_is_rounded_at_the_first_cut(table) -> None:
    start = dense()
    start[0]["ffn"] = start[0]["ffn"][:61]
    kept = solve(start, random_scores(6), table, {"params": 0.9 * table.dense["params"]}, ROUND)
    assert all(len(layer["ffn"]) % 8 == 0 or len(layer["ffn"]) == 61 for layer in kept)


@pytest.mark.parametrize("fraction", [0.8, 0.55])
@pytest.mark.parametrize("name", ["params", "latency", "memory"])
def test_uniform_kinds_stay_equally_wide_at_widths_that_are_allowed(table, name, fraction) -> None:
    scores = random_scores(7)
    limits = {name: table.least[name] + fraction * (table.dense[name] - table.least[name])}
    uniform = {"ffn": range(8, 64, 8), "heads": [1, 2]}
    kept = solve(dense(), scores, table, limits, ROUND, uniform)
    first, second = structures.widths(kept)
    assert first == second
    assert first["heads"] in (1, 2, 4)
    assert first["ffn"] in range(8, 65, 8)
    assert first != {"heads": 4, "ffn": 64}
    assert table.total([first, second])[name] <= limits[name]
    for layer, values in zip(kept, scores, strict=True):  # which units go is each layer's own matter
        best = sorted(range(64), key=lambda unit, v=values["ffn"]: -v[unit])[: len(layer["ffn"])]
        assert layer["ffn"] == sorted(best)
    ffn_only = solve(dense(), scores, table, {"params": 0.8 * table.dense["params"]}, ROUND, {"ffn": range(8, 64, 8)})
    assert len({len(layer["ffn"]) for layer in ffn_only}) == 1


def test_uniform_layers_that_differ_are_levelled(table) -> None:
    start = dense()
    start[1]["ffn"] = start[1]["ffn"][:40]
    kept = solve(start, random_scores(8), table, dict(table.dense), ROUND, {"ffn": range(8, 64, 8)})
    assert [layer["ffn"] for layer in structures.widths(kept)] == [40, 40]
