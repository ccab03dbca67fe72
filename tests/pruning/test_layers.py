"""Whole layers that go."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from adaptrain.pruning import cost
from adaptrain.pruning import structure as structures
from adaptrain.pruning.checkpoint import CHECKPOINT_KEY, replay
from adaptrain.pruning.cost_table import CostTable
from adaptrain.pruning.families import find_family
from adaptrain.pruning.layers import solve_with_layers
from adaptrain.pruning.optimizer_state import skip_empty
from adaptrain.pruning.solver import solve
from adaptrain.pruning.surgery import resize, shrink
from tests.pruning.models import MODELS, WITHOUT_HEADS, batch, loss_of
from tests.toys import tiny_bert

NAMES = [name for name in MODELS if name not in WITHOUT_HEADS]
KINDS = ("heads", "ffn")


def without(match: Any, gone: int) -> Any:
    """One layer gone, half of the other one's neurons as well."""
    keep = structures.without_layer(structures.dense(match), gone)
    keep[1 - gone]["ffn"] = keep[1 - gone]["ffn"][::2]
    return keep


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gone", [0, 1])
def test_it_computes_what_a_model_without_the_layer_would(name, gone) -> None:
    model = MODELS[name]().double().eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # the reference numbers its layers wrongly for it
    match, expected = find_family(model), copy.deepcopy(model)
    keep = without(match, gone)
    names = list(model.state_dict())
    shrink(match, keep)
    reference = find_family(expected)
    half = structures.dense(reference)
    half[1 - gone] = keep[1 - gone]
    shrink(reference, half)
    del reference.stacks[0][gone]
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).logits, expected(**batch()).logits)
    assert structures.current(match) == keep
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_copies_and_is_rebuilt(name) -> None:
    model, fresh = MODELS[name](), MODELS[name]().eval()
    match = find_family(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in (0, 1):
        loss_of(model, seed).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        skip_empty(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        if seed == 0:
            parameters = list(model.parameters())
            shrink(match, without(match, 1), [optimizer])
            assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
            assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in parameters)
    model.eval()
    with torch.no_grad():
        expected = model(**batch()).logits
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(**batch()).logits, expected)
        replay(fresh, {CHECKPOINT_KEY: structures.record(match)})
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(**batch()).logits, expected)
        dense = MODELS[name]().eval()
        resize(find_family(fresh), structures.dense(match))
        fresh.load_state_dict(dense.state_dict())
        assert torch.equal(fresh(**batch()).logits, dense(**batch()).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("gone", [0, 1])
def test_generation_with_a_cache_equals_generation_without(name, gone) -> None:
    model = MODELS[name]().eval()
    match = find_family(model)
    shrink(match, without(match, gone))
    prompt = batch()["input_ids"][1:]
    outputs = [
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0)
        for use_cache in (True, False)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", NAMES)
def test_its_costs_are_those_of_the_real_model(name) -> None:
    match = find_family(MODELS[name]())
    table = CostTable.build(match, KINDS, (4, 24), latency=False, layers=True)
    keep = without(match, 1)
    shrink(match, keep)
    total = table.total(structures.widths(keep))
    assert total["params"] == cost.count_params(match.model)
    assert total["flops"] == cost.count_flops(match.model, match.example_inputs(4, 24))


@pytest.mark.usefixtures("usual_repeats")
def test_the_time_of_a_layer_that_does_nothing_goes_too() -> None:
    table = CostTable.build(find_family(tiny_bert(layers=4)), KINDS, (4, 16), latency=True, layers=True)
    empty = [{"heads": 0, "ffn": 0}] * 4
    assert table.least["latency"] < table.total(empty)["latency"]
    assert table.least["params"] < table.total(empty)["params"]


@pytest.fixture(scope="module")
def table() -> CostTable:
    return CostTable.build(find_family(tiny_bert(layers=3)), KINDS, (4, 16), latency=False, layers=True)


def decide(table: CostTable, scores: Any, share: float) -> Any:
    limits = {"flops": share * table.dense["flops"]}
    dense = [{"heads": list(range(4)), "ffn": list(range(64))} for _ in range(3)]

    def cut(start: Any) -> Any:
        return solve(start, scores, table, limits, {"heads": 1, "ffn": 8})

    found = solve_with_layers(dense, scores, table, limits, cut)
    assert table.total(structures.widths(found))["flops"] <= limits["flops"]
    return found


def scores_of(*layers: tuple[float, float]) -> Any:
    """Each layer's units from one worth to another, evenly."""
    return [
        {
            "heads": [32 * (low + (high - low) * unit / 3) for unit in range(4)],
            "ffn": [low + (high - low) * unit / 63 for unit in range(64)],
        }
        for low, high in layers
    ]


def test_a_worthless_layer_is_dropped_and_valuable_ones_are_not_touched(table) -> None:
    two = [{"heads": 4, "ffn": 64}, {"heads": 0, "ffn": 0, "layers": 0}, {"heads": 4, "ffn": 64}]
    found = decide(table, scores_of((1, 1), (0.0, 0.1), (1, 1)), table.fractions(two)["flops"])
    assert [structures.is_dropped(layer) for layer in found] == [False, True, False]
    assert structures.widths(found)[0] == structures.widths(found)[2] == {"heads": 4, "ffn": 64}


def test_layers_stay_where_their_best_units_are_worth_more(table) -> None:
    found = decide(table, scores_of((0, 1), (0, 1), (0, 1)), 0.7)
    assert not any(map(structures.is_dropped, found))


def test_one_layer_stays_whatever_the_limit(table) -> None:
    scores = scores_of((1, 1), (1, 1), (1, 1))
    limits = {"flops": 0.0}
    dense = [{"heads": list(range(4)), "ffn": list(range(64))} for _ in range(3)]
    found = solve_with_layers(
        dense, scores, table, limits, lambda start: solve(start, scores, table, limits, {"heads": 1, "ffn": 8})
    )
    assert sum(map(structures.is_dropped, found)) == 2
