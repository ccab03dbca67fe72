"""A model of torch's own layers: the example that shows it, and what it computes once its heads are gone."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptrain import ConfigurationError, ModelFamily
from adaptrain.family.store import FamilyStore
from adaptrain.pruning import cost, families
from adaptrain.pruning import structure as structures
from adaptrain.pruning.checkpoint import CHECKPOINT_KEY, replay
from adaptrain.pruning.cost_table import CostTable
from adaptrain.pruning.families import find_family, register_family
from adaptrain.pruning.reconstruction import Reconstruction
from adaptrain.pruning.standins import SlicedMultiheadAttention
from adaptrain.pruning.surgery import shrink

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "prune_your_own_model.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("prune_your_own_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(example, monkeypatch) -> Any:
    monkeypatch.setattr(families, "_FAMILIES", list(families._FAMILIES))
    register_family(example.FAMILY)
    torch.manual_seed(0)
    return example.ByteClassifier().double().eval()


def structure(match: Any) -> Any:
    keep = structures.dense(match)
    keep[0]["heads"], keep[1]["heads"] = [1, 3], []
    keep[1]["ffn"], keep[2]["ffn"] = keep[1]["ffn"][::3], []
    return keep


def ids() -> torch.Tensor:
    tokens = torch.randint(1, 257, (4, 24), generator=torch.Generator().manual_seed(0))
    tokens[0, 15:] = 0
    return tokens


def zeroed(model: Any, keep: Any) -> Any:
    """The dense model with the same units held at zero, written against torch's layout by hand."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for layer, kept in zip(masked.encoder.layers, keep, strict=True):
            for head in set(range(4)) - set(kept["heads"]):
                layer.self_attn.out_proj.weight[:, 16 * head : 16 * (head + 1)] = 0
            gone = sorted(set(range(256)) - set(kept["ffn"]))
            layer.linear2.weight[:, gone] = 0
    return masked


@pytest.mark.parametrize("training", [False, True])
def test_it_computes_what_zeroed_units_would(model, training) -> None:
    match = find_family(model)
    keep = structure(match)
    masked = zeroed(model, keep)
    shrink(match, keep)
    for each in (model, masked):
        each.train(training)
        for module in each.modules():  # dropout draws by shape
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, (nn.MultiheadAttention, SlicedMultiheadAttention)):
                module.dropout = 0.0
    with torch.set_grad_enabled(training):  # in evaluation the dense model takes torch's fused kernel
        torch.testing.assert_close(model(ids()), masked(ids()))
    assert model.encoder.layers[0].self_attn.in_proj_weight.shape == (3 * 32, 64)


def test_every_parameter_takes_part_and_its_checkpoint_loads(model, example) -> None:
    match = find_family(model)
    keep = structure(match)
    shrink(match, keep)
    model(ids()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    fresh = example.ByteClassifier().double().eval()
    replay(fresh, {CHECKPOINT_KEY: structures.record(match)})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids()), model(ids()))
    replay(fresh, {})  # a checkpoint of the dense model
    assert type(fresh.encoder.layers[1].self_attn) is nn.MultiheadAttention


def test_neurons_are_reconstructed_and_heads_that_no_module_projects_are_not(model) -> None:
    match = find_family(model.train())
    found = Reconstruction(match, ("heads", "ffn"))
    found.start()
    model(ids())
    substitutes = found.solve(structure(match))
    found.stop()
    assert set(substitutes) == {(1, "ffn"), (2, "ffn")}


def test_its_costs_are_those_of_the_real_model(model) -> None:
    match = find_family(model)
    table = CostTable.build(match, ("heads", "ffn"), (4, 24), latency=False)
    keep = structure(match)
    shrink(match, keep)
    total = table.total(structures.widths(keep))
    assert total["params"] == cost.count_params(model)
    assert total["flops"] == cost.count_flops(model, match.example_inputs(4, 24))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_attention_with_all_heads_equals_torchs(batch_first, average) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).double().eval()
    sliced = SlicedMultiheadAttention(attention).eval()
    query, key, value = torch.randn(3, 6, 6, 16, dtype=torch.float64)
    causal = torch.ones(6, 6).triu(1).bool()
    padding = torch.zeros(6, 6, dtype=torch.bool)
    padding[1, 4:] = True
    given = {"key_padding_mask": padding, "attn_mask": causal, "average_attn_weights": average}
    for ours, theirs in zip(sliced(query, key, value, **given), attention(query, key, value, **given), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        sliced(query, key, value, need_weights=False, **given)[0], attention(query, key, value, **given)[0]
    )
    with pytest.raises(ValueError, match="an attn_mask of shape"):
        sliced(query, key, value, attn_mask=causal.expand(24, 6, 6))


def test_nested_tensors_are_refused(model) -> None:
    model.encoder.use_nested_tensor = True
    with pytest.raises(ConfigurationError, match="enable_nested_tensor=False"):
        find_family(model)


@pytest.mark.slow
def test_the_example_runs_and_meets_its_target(tmp_path) -> None:
    command = [sys.executable, str(EXAMPLE), "--limit-batches", "10", "--epochs", "2", "--folder", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # this checkout, not one that is installed
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200, env=environment)
    shares = {line.split()[0]: int(re.findall(r"\((\d+)%\)", line)[0]) for line in done.stdout.splitlines()[-4:-1]}
    assert shares["parameters"] <= 60
    assert shares["FLOPs"] <= 50
    assert "accuracy" in done.stdout


def test_a_family_of_it_is_opened_with_what_builds_it(example, model, tmp_path) -> None:
    store = FamilyStore(tmp_path)
    store.begin()
    about = {"task": "classification", "labels": [], "metric": None, "mode": "auto", "max_length": 24}
    store.write_about(about | {"shapes": {"batch": [2, 24]}, "device_type": "cpu"})
    match = find_family(model)
    store.add(match, name="dense", step=1)
    shrink(match, structure(match))
    store.add(match, name="final", step=2)
    opened = ModelFamily.load(tmp_path, build=example.ByteClassifier)
    with torch.no_grad():
        assert torch.equal(opened["final"].model()(ids()), model(ids()))
    assert opened.select(params_m=opened["final"].params / 1e6).name == "final"
    with pytest.raises(ConfigurationError, match=r"ByteClassifier, which is not of transformers: say how .* build="):
        ModelFamily.load(tmp_path)["final"].model()
