from __future__ import annotations

import itertools
import math
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from adaptrain.execution import update_probe
from adaptrain.execution.update_probe import gradient_norm, probe, reference_sizes, update_kind


def layers(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(one, other) for one, other in itertools.pairwise(sizes)))


def stepped(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    """Takes some steps, and leaves the gradients of one more. Gradients have a part in common, so that they align."""
    generator = torch.Generator().manual_seed(1)
    common = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in model.parameters()]
    for step in range(steps + 1):
        for p, shared in zip(model.parameters(), common, strict=True):
            p.grad = shared + torch.randn(p.shape, generator=generator)
        if step < steps:
            optimizer.step()


def plainly(optimizer: torch.optim.Optimizer, references: list[float]) -> tuple[float, float]:
    """The definition, in double precision and over every element: Adam's or momentum's update at lr 1, no decay."""
    dot = own = other = 0.0
    ratios = []
    for p, reference in zip((p for group in optimizer.param_groups for p in group["params"]), references, strict=True):
        state, group = optimizer.state[p], optimizer.param_groups[0]
        assert p.grad is not None
        grad = p.grad.double()
        if "exp_avg" in state:
            first, second = (1 - beta ** float(state["step"]) for beta in group["betas"])
            update = (state["exp_avg"].double() / first) / (
                (state["exp_avg_sq"].double() / second).sqrt() + group["eps"]
            )
            direction = state["exp_avg"].double() / (
                state["exp_avg_sq"].double().sqrt() + group["eps"] * math.sqrt(second)
            )
        else:
            update = direction = state["momentum_buffer"].double()
        dot += float((grad * direction).sum())
        own += float(grad.square().sum())
        other += float(direction.square().sum())
        if reference:
            ratios.append(float(update.norm()) / reference)
    return dot / math.sqrt(own * other), median(ratios)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adam, large epsilon": lambda p: torch.optim.Adam(p, lr=1e-3, eps=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (64, 64), (6, 4, 2, 3), (1, 50)])
def test_updates_are_measured_by_the_root_mean_square_of_singular_values(shape):
    weight = nn.Parameter(torch.randn(shape))
    found, bias = reference_sizes(torch.optim.SGD([weight, nn.Parameter(torch.ones(3))], lr=0.1))
    values = torch.linalg.svdvals(weight.detach().flatten(1))
    assert found == pytest.approx(float(values.square().mean().sqrt()))
    assert bias == 0.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_double_precision_is_measured_in_double_precision(name):
    model = layers(20, 30, 10).double()
    optimizer = OPTIMIZERS[name](model.parameters())
    stepped(model, optimizer)
    references = reference_sizes(optimizer)
    assert probe(optimizer, references) == pytest.approx(plainly(optimizer, references), rel=1e-12)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e60)  # finite there, and not in single precision
    assert float(gradient_norm(optimizer)) == pytest.approx(
        1e60 * math.sqrt(sum(p.numel() for p in model.parameters()))
    )


def test_complex_parameters_count_in_the_norm_and_are_no_measure():
    one, other = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    optimizer = torch.optim.AdamW([one, other], lr=1e-3)
    ((one * other).abs() ** 2).sum().backward()
    assert one.grad is not None
    assert other.grad is not None
    expected = math.sqrt(float(one.grad.square().sum()) + float(other.grad.abs().square().sum()))
    assert float(gradient_norm(optimizer)) == pytest.approx(expected)
    references = reference_sizes(optimizer)
    assert references[1] == 0.0
    alone = torch.optim.AdamW([one], lr=1e-3)
    assert probe(optimizer, references) == probe(alone, reference_sizes(alone))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_small_model_is_measured_whole(name):
    model = layers(20, 30, 10)
    optimizer = OPTIMIZERS[name](model.parameters())
    stepped(model, optimizer)
    references = reference_sizes(optimizer)
    assert references[1] == 0.0  # a bias is no measure
    cosine, ratio = plainly(optimizer, references)
    assert probe(optimizer, references) == pytest.approx((cosine, ratio), rel=1e-4)
    assert probe(optimizer, references, turn=3) == probe(optimizer, references)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_of_a_large_model_a_sample_says_the_same(name):
    model = layers(1500, 1200, 1200, 700)  # 4 million
    optimizer = OPTIMIZERS[name](model.parameters())
    stepped(model, optimizer, steps=2)
    references = reference_sizes(optimizer)
    cosine, ratio = plainly(optimizer, references)
    assert cosine > 0.1
    seen = [probe(optimizer, references, turn=turn) for turn in range(4)]
    for each in seen:
        assert each == pytest.approx((cosine, ratio), rel=0.02)
    assert len(set(seen)) == 4  # other rows each time


def test_a_sample_is_of_few_elements_and_all_have_their_turn(monkeypatch):
    model = layers(300, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter)
    monkeypatch.setattr(update_probe, "_SAMPLE", 6000)
    seen = torch.zeros_like(weight)
    numbered = torch.arange(weight.numel()).view_as(weight).float()
    weight.grad = numbered.clone()
    for turn in range(11):
        ((grad, *_, _), (bias, *_)) = next(update_probe._sampled(optimizer, reference_sizes(optimizer), turn))
        assert grad.numel() <= 6000
        assert grad.is_contiguous()
        assert bias.numel() == 200  # small tensors are never sampled
        seen.view(-1)[grad.long().view(-1)] += 1
    assert seen.min() >= 1


@pytest.mark.parametrize("shape", [(2, 9000), (9000, 2), (3, 5000, 2), (20000,), (1, 1, 5000), (70, 70)])
def test_every_shape_is_sampled_along_its_longest_side(shape, monkeypatch):
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(shape)
    optimizer.step()
    monkeypatch.setattr(update_probe, "_SAMPLE", 300)
    ((grad, _, _, weight, *_),) = next(update_probe._sampled(optimizer, [0.0], 5))
    assert weight * grad.numel() == pytest.approx(parameter.numel())
    assert grad.numel() <= 2 * 300


def test_before_the_first_step_only_the_size_is_known():
    model = layers(5, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stepped(model, optimizer, steps=0)
    cosine, ratio = probe(optimizer, reference_sizes(optimizer))
    assert cosine is None
    weight = next(model.parameters()).detach()
    assert ratio == pytest.approx(math.sqrt(20) / float(weight.norm() / 2))  # of rank 4
    assert update_kind(torch.optim.Adagrad(model.parameters())) is None
    assert probe(torch.optim.Adagrad(model.parameters()), [1.0, 0.0]) == (None, None)


def test_one_bad_gradient_anywhere_makes_the_norm_bad():
    model = layers(50, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model, optimizer)
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert float(gradient_norm(optimizer)) == pytest.approx(float(expected), rel=1e-5)
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter)
    assert weight.grad is not None
    weight.grad[17, 3] = math.inf
    assert not math.isfinite(float(gradient_norm(optimizer)))
