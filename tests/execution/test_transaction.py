from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from adaptrain.execution.transaction import Transaction


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)
        self.values = torchmetrics.CatMetric()
        self.register_buffer("replaced", torch.zeros(2))

    def step(self) -> torch.Tensor:
        x = torch.rand(4, 3)
        y = self.norm(self.linear(x))
        self.accuracy(y, torch.randint(2, (4,)))
        self.values.update(torch.rand(3))
        self.replaced = torch.rand(2)
        y.sum().backward()
        return x

    def state(self) -> list[torch.Tensor]:
        values = self.values.compute() if self.values.value else torch.zeros(0)
        return [*(buffer.clone() for buffer in self.buffers()), self.accuracy.tp.clone(), values.clone()]


def draws() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.filterwarnings("ignore:.*compute.*")
def test_rollback_restores_what_a_step_changes() -> None:
    module = Holder()
    module.step()
    module.zero_grad()
    transaction = Transaction(module)
    for _ in range(3):  # a transaction serves one step after another
        before = module.state()
        count = module.accuracy._update_count
        transaction.begin(hold_gradients=False)
        first = module.step()
        numbers = draws()
        for _ in range(2):  # and one step may fail more than once
            transaction.rollback()
            assert all(torch.equal(a, b) for a, b in zip(module.state(), before, strict=True))
            assert module.accuracy._update_count == count
            assert all(parameter.grad is None for parameter in module.parameters())
            assert torch.equal(module.step(), first)
            assert draws() == numbers
        transaction.commit()
        assert not torch.equal(module.norm.running_mean, before[0])


def test_gradients_of_earlier_batches_are_kept() -> None:
    module = nn.Linear(3, 1).double()
    x = torch.rand(5, 3, dtype=torch.double)
    module(x).sum().backward()
    earlier = module.weight.grad.clone()
    transaction = Transaction(module)
    transaction.begin(hold_gradients=True)
    assert module.weight.grad is None
    module(x).sum().backward()
    transaction.rollback()
    module(x).sum().backward()
    transaction.commit()
    torch.testing.assert_close(module.weight.grad, 2 * earlier)

    transaction.begin(hold_gradients=True)
    module(x).sum().backward()
    transaction.abort()
    torch.testing.assert_close(module.weight.grad, 2 * earlier)


def test_a_large_buffer_that_does_not_change_is_copied_once() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.zeros(2**18))
    transaction = Transaction(module)
    transaction.begin(hold_gradients=False)
    copied = transaction._buffers[id(module.table)][2]
    transaction.begin(hold_gradients=False)
    assert transaction._buffers[id(module.table)][2] is copied
    module.table += 1
    transaction.begin(hold_gradients=False)
    assert transaction._buffers[id(module.table)][2] is not copied


@pytest.mark.filterwarnings("ignore:.*compute.*")
def test_a_step_in_inference_mode_is_taken_back_and_training_goes_on_after_it() -> None:
    module = Holder()
    module.register_buffer("large", torch.zeros(2**19))
    module.linear.weight.grad = torch.ones_like(module.linear.weight)
    transaction = Transaction(module)
    with torch.inference_mode():
        module.register_buffer("made_there", torch.zeros(3))
        transaction.look()
        for _ in range(2):
            before = module.state()
            transaction.keep()
            with torch.inference_mode(False):
                module.norm.running_mean += 1
            module.large += 1
            module.made_there += 1
            module.replaced = torch.rand(2)
            module.accuracy(torch.rand(4, 2), torch.randint(2, (4,)))
            module.values.update(torch.rand(3))
            transaction.restore()
            assert all(torch.equal(a, b) for a, b in zip(module.state(), before, strict=True))
    assert module.linear.weight.grad is not None
    module.step()  # copies made in inference mode could not be changed here
    module.large += 1
