from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from adaptrain.pruning import cost
from adaptrain.pruning.cost_table import CostTable
from adaptrain.pruning.families import find_family
from adaptrain.pruning.hollow import hollow_model, is_hollow
from adaptrain.resources.peak import PeakMemory
from tests.pruning.models import MODELS, WITHOUT_HEADS

LIKE = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_hollow_twin_counts_as_a_full_one(name: str, dtype: torch.dtype) -> None:
    match = find_family(MODELS[name]().to(dtype))
    full, hollow, inputs = match.dense_twin(), match.hollow_twin(), match.example_inputs(2, 8)
    assert any(map(is_hollow, hollow.parameters()))
    assert cost.count_params(hollow) == cost.count_params(full)  # ties too
    assert cost.count_flops(hollow, inputs) == cost.count_flops(full, inputs)
    assert cost.peak_activation_bytes(hollow, inputs) == cost.peak_activation_bytes(full, inputs)
    assert cost.size_on_disk_bytes(hollow) == pytest.approx(cost.size_on_disk_bytes(full), rel=0.05)  # padding
    for (own, there), (other, expected) in zip(hollow.named_buffers(), full.named_buffers(), strict=True):
        assert own == other
        assert torch.equal(there, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_table_without_latency_needs_no_full_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    match = find_family(MODELS[name]())
    kinds = ("ffn",) if name in WITHOUT_HEADS else ("heads", "ffn")
    found = CostTable.build(match, kinds, (2, 8), latency=False, layers="layers" not in match.family.kept)
    monkeypatch.setattr(type(match), "hollow_twin", type(match).dense_twin)
    assert found.state == CostTable.build(match, kinds, (2, 8), latency=False, layers="rest" in found.state).state


def test_the_random_state_stays() -> None:
    match = find_family(MODELS["bert"]())
    before = torch.get_rng_state()
    match.hollow_twin()
    assert torch.equal(torch.get_rng_state(), before)


def test_it_takes_no_memory_on_the_way() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=512, num_hidden_layers=24, num_attention_heads=8, intermediate_size=4096
    )
    peak = PeakMemory()
    peak.reset()
    before = peak.read()
    model = hollow_model(lambda: BertForSequenceClassification(config), like=LIKE)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 400 * 2**20
    cost.count_flops(model, cost.example_inputs(model, 1, 8))
    held = peak.read() - before
    peak.close()
    assert held < weights / 5


def test_a_constructor_that_reads_its_weights_is_run_with_weights() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.scale = float(self.inner.weight.abs().max())

    model = hollow_model(Scaled, like=LIKE)
    assert isinstance(model, Scaled)
    assert 0 < model.scale < 1
    assert is_hollow(model.inner.weight)
    assert "take" not in nn.Module.register_parameter.__name__  # put back


def test_a_views_own_memory_counts_and_not_what_it_is_a_view_of() -> None:
    module = nn.Linear(64, 64)
    state = io.BytesIO()
    torch.save(module.state_dict(), state)
    assert cost.size_on_disk_bytes(module) == pytest.approx(len(state.getvalue()), rel=0.01)
    assert not is_hollow(module.weight[:2])
    assert not is_hollow("text")
