"""Embedding gradients that are added row by row equal the dense ones, and only where that holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptrain.execution.embedding import SparseAccumulation

ROWS, WIDTH = 4096, 256


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, WIDTH, dtype=torch.float64, **options)
        self.head = nn.Linear(WIDTH, 3, dtype=torch.float64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids).tanh().mean(1)).square().sum()


def gradients(model: nn.Module, batches: list[torch.Tensor], *, sparse: bool) -> tuple[dict, list[bool]]:
    model.zero_grad()
    accumulation, kinds = SparseAccumulation(model), []
    for ids in batches:
        if sparse:
            with accumulation.adding():
                kinds.append(model.embedding.sparse)
                model(ids).backward()
        else:
            model(ids).backward()
        assert not model.embedding.weight.grad.is_sparse
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, kinds


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}], ids=["plain", "padding"])
def test_the_sum_is_the_dense_one(options: dict) -> None:
    model = Model(**options)
    batches = [torch.randint(0, ROWS, (4, 7)).clamp(min=int(i == 1)) for i in range(4)]
    batches[2][0] = 0
    dense, _ = gradients(model, batches, sparse=False)
    added, kinds = gradients(model, batches, sparse=True)
    assert kinds == [False, True, True, True]  # the first makes the dense gradient
    assert not model.embedding.sparse
    for name, gradient in dense.items():
        torch.testing.assert_close(added[name], gradient, rtol=1e-14, atol=1e-15)


def used(model: nn.Module) -> list[bool]:
    return gradients(model, [torch.randint(0, ROWS, (2, 3)) for _ in range(2)], sparse=True)[1]


def test_a_shared_weight_stays_dense() -> None:
    model = Model()
    model.head = nn.Linear(WIDTH, ROWS, bias=False, dtype=torch.float64)
    model.head.weight = model.embedding.weight
    assert used(model) == [False, False]


def test_a_weight_that_a_hook_watches_stays_dense() -> None:
    model = Model()
    seen = []
    handle = model.embedding.weight.register_hook(lambda gradient: seen.append(gradient.is_sparse))
    assert used(model) == [False, False]
    assert seen == [False, False]
    handle.remove()
    assert used(model) == [False, True]


def test_small_frequency_scaled_and_half_precision_ones_stay_dense() -> None:
    small = Model()
    small.embedding = nn.Embedding(64, WIDTH, dtype=torch.float64)
    assert not SparseAccumulation(small)._embeddings
    assert not SparseAccumulation(Model(scale_grad_by_freq=True))._embeddings
    assert not SparseAccumulation(Model().bfloat16())._embeddings


def test_a_frozen_weight_is_left_alone() -> None:
    model = Model()
    model.embedding.weight.requires_grad_(False)
    with SparseAccumulation(model).adding():
        model(torch.randint(0, ROWS, (2, 3))).backward()
    assert model.embedding.weight.grad is None


def test_a_compiled_model_is_left_alone() -> None:
    model = Model()
    model.compile(backend="eager")
    assert not SparseAccumulation(model)._embeddings
