from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from adaptrain.execution.optimizer import HalfUpdatedError, guard_step


class Failing(torch.optim.SGD):
    """Runs out of memory in its first updates, before or after it changed a parameter."""

    def __init__(self, parameters, *, times: int = 1, after: bool = False, message: str = "std::bad_alloc") -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.times, self.after, self.message = times, after, message

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        if self.times and self.after:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
        if self.times:
            self.times -= 1
            raise RuntimeError(self.message)
        super().step()
        return loss


def train(optimizer_of, *, guard: bool, closure: bool = True) -> tuple[torch.Tensor, int]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = optimizer_of(model.parameters())
    undo = guard_step(optimizer) if guard else lambda: None
    calls = 0

    def compute():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        if closure:
            assert optimizer.step(closure=compute) is not None
        else:
            compute()
            optimizer.step()
    undo()
    assert "step" not in vars(optimizer)
    return model.weight.detach().clone(), calls


@pytest.mark.parametrize("closure", [True, False])
def test_an_update_that_changed_nothing_is_tried_again(closure: bool) -> None:
    expected, _ = train(lambda p: Failing(p, times=0), guard=False, closure=closure)
    got, calls = train(lambda p: Failing(p, times=1), guard=True, closure=closure)
    assert torch.equal(got, expected)
    assert calls == 3  # forward and backward did not run again


@pytest.mark.parametrize("closure", [True, False])
def test_a_half_done_update_is_not_repeated(closure: bool) -> None:
    with pytest.raises(HalfUpdatedError, match=r"middle of the optimizer's update.*last checkpoint"):
        train(lambda p: Failing(p, after=True), guard=True, closure=closure)


def test_it_is_tried_once_more_only_and_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="bad_alloc"):
        train(lambda p: Failing(p, times=2), guard=True)
    with pytest.raises(RuntimeError, match="shapes"):
        train(lambda p: Failing(p, message="shapes"), guard=True)


def test_a_scheduler_made_later_steps_through_the_guard_which_then_comes_off() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = Failing([parameter], times=1)
    undo = guard_step(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the method it finds
    parameter.sum().backward()
    optimizer.step()
    scheduler.step()
    undo()
    optimizer.times = 1
    with pytest.raises(RuntimeError, match="bad_alloc"):
        optimizer.step()


def test_a_scheduler_does_not_take_the_guard_for_an_override() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    undo = guard_step(optimizer)
    parameter.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
    undo()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
