from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptrain.compression import quantize
from adaptrain.compression.aware import AWARE_METHODS, rounded_inputs, train_rounded
from adaptrain.compression.int8 import Int8Linear, round_rows
from adaptrain.pruning.families import find_family
from tests.pruning.models import MODELS
from tests.toys import tiny_bert


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("method", AWARE_METHODS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "distilbert", "t5"])
def test_the_model_computes_as_it_will_once_it_is_quantized(name, method) -> None:
    model = MODELS[name]().eval()
    inputs = find_family(model).example_inputs(4, 12)
    full, small = outputs(model, inputs), outputs(quantize(model, method).model, inputs)
    stop = train_rounded(model, method)
    aware = outputs(model, inputs)
    stop()
    # Integer arithmetic rounds an input the other way here and there, where it lies between two steps.
    near = {"rtol": 1e-5, "atol": 1e-6} if method != "int8_dynamic" else {"rtol": 0, "atol": 0.02 * float(full.std())}
    torch.testing.assert_close(aware, small, **near)
    assert float((aware - full).abs().max()) > 1e-4 * float(full.abs().max())
    assert torch.equal(outputs(model, inputs), full)


def test_inputs_are_rounded_as_the_integer_kernel_rounds_them() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 16)
    kernel = Int8Linear(*round_rows(linear.weight), linear.bias, dynamic=True)
    for inputs in (torch.randn(8, 64), torch.rand(8, 64) + 1, -torch.rand(8, 64), torch.zeros(8, 64)):
        expected = rounded_inputs(inputs) @ kernel.weight.T + linear.bias.detach()
        step = float(inputs.clamp(min=0).max() - inputs.clamp(max=0).min()) / 127
        # At most one input in hundred may lie so near the middle between two steps that the kernel goes the other way.
        bound = step * float(kernel.weight.abs().max()) + 1e-5
        assert float((kernel(inputs) - expected).abs().max()) <= bound


def test_gradients_pass_and_parameters_stay_what_they_are() -> None:
    model = tiny_bert()
    names, held = list(model.state_dict()), [id(p) for p in model.parameters()]
    inputs = find_family(model).example_inputs(2, 8)
    stop = train_rounded(model, "int4_weight")
    assert (list(model.state_dict()), [id(p) for p in model.parameters()]) == (names, held)
    model(**inputs).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)
    linear: Any = model.bert.encoder.layer[0].output.dense
    linear.weight.grad = None
    seen = torch.randn(3, linear.in_features, requires_grad=True)
    linear(seen).sum().backward()
    torch.testing.assert_close(linear.weight.grad, seen.detach().sum(0).expand_as(linear.weight))  # as if not rounded
    stop()
    assert "forward" not in linear.__dict__


def test_four_bits_lose_less_when_training_knows_of_them() -> None:
    """A network that has learned a function well is trained for as long again, plainly or rounded; then both round."""

    def loss(seed: int, *, aware: bool) -> float:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        inputs = torch.randn(256, 8)
        wanted = (inputs[:, :4] * inputs[:, 4:]).sum(1, keepdim=True)
        stop = None
        for lr in (1e-2, 1e-3):
            optimizer = torch.optim.Adam(model.parameters(), lr=lr)
            for _ in range(300):
                optimizer.zero_grad()
                F.mse_loss(model(inputs), wanted).backward()
                optimizer.step()
            if stop is None:
                stop = train_rounded(model, "int4_weight") if aware else lambda: None
        assert stop is not None
        stop()
        with torch.no_grad():
            return float(F.mse_loss(quantize(model, "int4_weight").model(inputs), wanted))

    # Together: of one seed the two may come out alike, and which one differs from processor to processor.
    assert sum(loss(seed, aware=True) for seed in range(4)) < 0.7 * sum(loss(seed, aware=False) for seed in range(4))


def test_a_copy_made_meanwhile_computes_with_its_own_weights() -> None:
    model = tiny_bert().eval()
    inputs = find_family(model).example_inputs(2, 8)
    stop = train_rounded(model, "int4_weight")
    copied = copy.deepcopy(model)
    before = outputs(model, inputs)
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert torch.equal(outputs(copied, inputs), before)
    assert not torch.equal(outputs(model, inputs), before)
    stop()


def test_what_someone_else_runs_in_another_way_is_left_alone() -> None:
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear)
    own = linear.forward
    linear.__dict__["forward"] = own
    stop = train_rounded(model, "int4_weight")
    stop()
    assert linear.__dict__["forward"] is own
