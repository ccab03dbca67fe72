from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from adaptrain import ConfigurationError
from adaptrain.execution.sandwich import SandwichLoss
from tests.toys import text_loader, tiny_bert


def test_the_loss_is_the_task_and_what_the_networks_miss():
    model, smaller, smallest = (tiny_bert(ffn=size) for size in (64, 32, 16))
    batch = next(iter(text_loader()))
    sandwich = SandwichLoss(model, [smaller, smallest])
    total, learned = sandwich(lambda: model(**batch).loss, 3)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        theirs = model(**inputs).logits.log_softmax(-1)
        expected = [
            F.kl_div(each(**inputs).logits.log_softmax(-1), theirs, log_target=True, reduction="batchmean")
            for each in (smaller, smallest)
        ]
        task = float(model(**batch).loss)
    assert learned is not None
    assert float(learned) == pytest.approx(sum(map(float, expected)), rel=1e-5)
    assert float(total.detach()) == pytest.approx(task + sum(map(float, expected)), rel=1e-5)

    # The whole model learns the task alone; the smaller ones learn from it.
    total.backward()
    gradient = model.classifier.weight.grad.clone()
    model.zero_grad()
    model(**batch).loss.backward()
    assert torch.allclose(gradient, model.classifier.weight.grad, atol=1e-7)
    assert smaller.classifier.weight.grad is not None
    assert smallest.classifier.weight.grad is not None


def test_the_smallest_always_and_each_of_the_others_sometimes():
    networks = [object(), object(), object()]
    sandwich = SandwichLoss(tiny_bert(), networks)  # pyright: ignore[reportArgumentType]
    chosen = [sandwich.chosen(number) for number in range(40)]
    assert all(pair[1] is networks[2] for pair in chosen)
    assert {id(pair[0]) for pair in chosen} == {id(networks[0]), id(networks[1])}
    again = SandwichLoss(tiny_bert(), networks)  # pyright: ignore[reportArgumentType]
    assert [again.chosen(number) for number in range(40)] == chosen
    assert SandwichLoss(tiny_bert(), networks[:1]).chosen(0) == networks[:1]  # pyright: ignore[reportArgumentType]


def test_what_does_not_run_the_model_is_refused():
    sandwich = SandwichLoss(tiny_bert(), [tiny_bert()])
    assert sandwich(lambda: None, 0) == (None, None)
    with pytest.raises(ConfigurationError, match="did not call it with gradients"):
        sandwich(lambda: torch.zeros(()), 0)
