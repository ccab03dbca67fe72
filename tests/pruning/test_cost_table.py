from __future__ import annotations

import itertools
import json
from statistics import fmean

import pytest
import torch

from adaptrain.pruning import cost
from adaptrain.pruning import structure as structures
from adaptrain.pruning.cost_table import CostTable, isotonic, measuring_twin, with_structure
from adaptrain.pruning.families import Match, find_family
from adaptrain.pruning.surgery import shrink
from tests.pruning.models import MODELS
from tests.toys import tiny_bert, tiny_llama

KINDS = ("heads", "ffn")
SHAPE = (4, 24)


def structure(match: Match, *widths: tuple[int, int]) -> list[dict[str, list[int]]]:
    """The first units of each layer, the widths in turn; never more than there are."""
    turns = itertools.islice(itertools.cycle(widths), len(match.layers))
    return [
        {"heads": layer["heads"][:heads], "ffn": layer["ffn"][:ffn]}
        for layer, (heads, ffn) in zip(structures.dense(match), turns, strict=True)
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("widths", [((2, 64), (1, 24)), ((0, 40), (2, 0)), ((0, 0), (0, 0))])
def test_parameters_and_flops_equal_the_real_model(name, widths) -> None:
    match = find_family(MODELS[name]())
    table = CostTable.build(match, KINDS, SHAPE, latency=False)
    keep = structure(match, *widths)
    shrink(match, keep)
    total = table.total(structures.widths(keep))
    assert total["params"] == cost.count_params(match.model)
    assert total["flops"] == cost.count_flops(match.model, match.example_inputs(*SHAPE))


@pytest.mark.parametrize(
    "build", [lambda: tiny_bert(layers=4, ffn=256), lambda: tiny_llama(layers=4, heads=8, kv_heads=4, ffn=256)]
)
@pytest.mark.parametrize("widths", [(4, 256), (2, 100), (4, 0), (1, 256), (3, 16)])
def test_memory_is_near_what_the_real_model_uses(build, widths) -> None:
    match = find_family(build())
    table = CostTable.build(match, KINDS, SHAPE, latency=False)
    keep = structure(match, widths)
    shrink(match, keep)
    weights = sum(t.numel() * t.element_size() for t in (*match.model.parameters(), *match.model.buffers()))
    real = weights + cost.peak_activation_bytes(match.model, match.example_inputs(*SHAPE))
    assert table.total(structures.widths(keep))["memory"] == pytest.approx(real, rel=0.06)


@pytest.mark.usefixtures("usual_repeats")
def test_latency_points_are_monotone_and_end_at_the_measured_models() -> None:
    match = find_family(tiny_bert(layers=3, hidden=64, ffn=256))
    table = CostTable.build(match, KINDS, (8, 32), latency=True)
    for layer in table.state["latency"]:
        for kind, dense in (("heads", 4), ("ffn", 256)):
            widths, above = zip(*layer[kind], strict=True)
            assert widths[0] == above[0] == 0
            assert widths[-1] == dense
            assert list(above) == sorted(above)
            middle = (widths[1] + widths[2]) / 2
            assert above[1] <= table.piece("latency", 0, kind, int(middle)) <= above[2]
    assert 0 < table.least["latency"] <= table.dense["latency"]
    assert table.fractions(structures.widths(structures.dense(match)))["latency"] == pytest.approx(1)


def test_only_what_may_go_is_gone_in_the_least() -> None:
    match = find_family(tiny_bert())
    table = CostTable.build(match, ("ffn",), SHAPE, latency=True)
    shrink(match, structure(match, (4, 0), (4, 0)))
    assert table.least["params"] == cost.count_params(match.model)
    assert set(table.state["latency"][0]) == {"ffn"}


def test_a_table_is_plain_and_the_same_for_a_model_that_was_cut() -> None:
    match = find_family(tiny_bert())
    table = CostTable.build(match, KINDS, SHAPE, latency=False)
    shrink(match, structure(match, (1, 8), (4, 64)))
    assert CostTable.build(match, KINDS, SHAPE, latency=False).state == table.state
    assert CostTable(json.loads(json.dumps(table.state))).dense == table.dense


def test_building_leaves_model_and_random_state_alone() -> None:
    model = tiny_bert(dropout=0.1)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    CostTable.build(find_family(model), KINDS, SHAPE, latency=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training


def test_a_structure_to_measure_shares_what_is_outside_the_layers() -> None:
    twin = Match(find_family(tiny_bert()).dense_twin(), find_family(tiny_bert()).family)
    small = with_structure(twin, structure(twin, (1, 8), (0, 0)))
    assert small.get_parameter("classifier.weight") is twin.model.classifier.weight
    assert cost.count_params(small) < cost.count_params(twin.model)
    assert structures.widths(structures.current(twin)) == [{"heads": 4, "ffn": 64}] * 2


def test_a_structure_to_measure_has_what_it_keeps_of_the_layers_in_memory_of_its_own() -> None:
    twin = Match(find_family(tiny_bert()).dense_twin(), find_family(tiny_bert()).family)
    before = {name: parameter.clone() for name, parameter in twin.model.named_parameters()}
    smaller = with_structure(twin, structure(twin, (4, 64), (1, 0)))
    theirs = dict(twin.layers[0].named_parameters())
    for name, own in find_family(smaller).layers[0].named_parameters():
        assert torch.equal(own, theirs[name])
        assert own.untyped_storage().data_ptr() != theirs[name].untyped_storage().data_ptr()
    layers = find_family(smaller).layers
    assert all(p.untyped_storage().nbytes() == p.nbytes for layer in layers for p in layer.parameters())
    with torch.no_grad():
        for parameter in layers[0].parameters():
            parameter.fill_(1.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in twin.model.named_parameters())


@pytest.mark.parametrize("seed", range(5))
def test_noise_in_times_is_evened_out_and_what_rises_is_kept(seed: int) -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(seed)).tolist()
    # The min-max formula of isotonic regression (Barlow et al. 1972).
    expected = [
        min(max(fmean(values[a : b + 1]) for a in range(i + 1)) for b in range(i, len(values)))
        for i in range(len(values))
    ]
    assert isotonic(values) == pytest.approx(expected)
    assert isotonic(sorted(values)) == sorted(values)


@pytest.mark.parametrize("name", MODELS)
def test_a_measuring_twin_holds_nothing_twice_but_its_layers(name) -> None:
    match = find_family(MODELS[name]())
    shrink(match, structure(match, (1, 8)))
    before = {name: parameter.clone() for name, parameter in match.model.named_parameters()}
    twin = measuring_twin(match)
    assert structures.widths(structures.current(twin)) == structures.widths(structures.dense(match))
    inside = {id(parameter) for layer in twin.layers for parameter in layer.parameters()}
    own = dict(match.model.named_parameters())
    outside = [name for name, parameter in twin.model.named_parameters() if id(parameter) not in inside]
    assert outside
    for name, parameter in twin.model.named_parameters():
        same = parameter.data_ptr() == own[name].data_ptr()
        assert same == (name in outside)
    smaller = with_structure(twin, structures.current(match))
    cost.measure_latency({"dense": twin.model, "smaller": smaller}, match.example_inputs(2, 4), repeats=1, copies=2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in match.model.named_parameters())
