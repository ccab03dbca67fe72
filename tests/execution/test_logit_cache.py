"""What a teacher said of each sample: the same as asking again, and asked only once."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from adaptrain.execution.distillation import DistillationLoss
from adaptrain.execution.logit_cache import LogitCache
from tests.toys import tiny_bert, tiny_llama

MIB = 2**20


class Teacher:
    """A real model that counts the samples it was asked about."""

    def __init__(self) -> None:
        self.model = tiny_bert().double().eval().requires_grad_(False)
        self.asked = 0

    def __call__(self, **inputs: Any) -> torch.Tensor:
        self.asked += len(inputs["input_ids"])
        return self.model(**inputs).logits


def samples(count: int, tokens: int, *, padding: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (count, tokens), generator=torch.Generator().manual_seed(count))
    mask = torch.ones_like(ids)
    if padding:
        pad = torch.zeros(count, padding, dtype=ids.dtype)
        ids, mask = (torch.cat([pad, t] if left else [t, pad], 1) for t in (ids, mask))
    return {"input_ids": ids, "attention_mask": mask}


def ask(cache: LogitCache, teacher: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return cache.ask(teacher, (), inputs, inputs.get("attention_mask"))


def test_samples_that_come_again_in_another_order_and_padding_are_not_asked_again():
    cache, teacher = LogitCache(MIB), Teacher()
    first = samples(6, 7)
    whole = ask(cache, teacher, first)
    assert torch.equal(whole, teacher.model(**first).logits)
    order = [4, 0, 5]
    again = {name: torch.nn.functional.pad(value[order], (0, 3)) for name, value in first.items()}
    asked = teacher.asked
    assert torch.equal(ask(cache, teacher, again), whole[order])
    assert teacher.asked == asked


def test_only_new_samples_of_a_batch_are_asked_about():
    cache, teacher = LogitCache(MIB), Teacher()
    first, second = samples(4, 7), samples(5, 7)
    ask(cache, teacher, first)
    mixed = {name: torch.cat([second[name][:2], first[name], second[name][2:]]) for name in first}
    got = ask(cache, teacher, mixed)
    assert teacher.asked == 4 + 5
    torch.testing.assert_close(got, teacher.model(**mixed).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", ["token", "type", "length", "dtype", "setting"])
def test_what_differs_is_another_sample(change):
    cache, teacher = LogitCache(MIB), Teacher()
    inputs: dict[str, Any] = samples(2, 7) | {"token_type_ids": torch.zeros(2, 7, dtype=torch.long)}
    ask(cache, teacher, inputs)
    other = {name: value.clone() for name, value in inputs.items()}
    if change == "token":
        other["input_ids"][:, 3] += 1
    elif change == "type":
        other["token_type_ids"][:, 3] = 1
    elif change == "length":
        other["attention_mask"][:, -1] = 0
    elif change == "dtype":
        other["token_type_ids"] = other["token_type_ids"].int()
    else:
        other["output_attentions"] = False
    torch.testing.assert_close(ask(cache, teacher, other), teacher.model(**other).logits)
    assert teacher.asked == 4


def test_a_full_cache_stays_right_and_takes_no_more():
    cache, teacher = LogitCache(700), Teacher()  # room for three
    inputs = samples(8, 7)
    expected = teacher.model(**inputs).logits
    for _ in range(2):
        torch.testing.assert_close(ask(cache, teacher, inputs), expected, rtol=1e-12, atol=1e-12)
    assert len(cache) == 3
    assert teacher.asked == 8 + 5


def test_one_sample_twice_in_a_batch():
    cache, teacher = LogitCache(MIB), Teacher()
    inputs = {name: value[[0, 1, 0]] for name, value in samples(2, 7).items()}
    torch.testing.assert_close(ask(cache, teacher, inputs), ask(cache, teacher, inputs), rtol=1e-12, atol=1e-12)
    assert len(cache) == 2


def test_left_padding_is_left_out():
    cache, teacher = LogitCache(MIB), Teacher()
    ask(cache, teacher, samples(3, 7))
    ask(cache, teacher, samples(3, 7, padding=2, left=True))
    assert teacher.asked == 3


def test_logits_of_every_token_and_arguments_that_have_no_rows_are_passed_on():
    cache = LogitCache(MIB)
    model = tiny_llama().eval().requires_grad_(False)
    inputs = samples(3, 7)
    for _ in range(2):
        got = cache.ask(lambda **given: model(**given).logits, (), inputs, inputs["attention_mask"])
        assert torch.equal(got, model(**inputs).logits)
    assert len(cache) == 0
    teacher = Teacher()
    odd = inputs | {"position_ids": torch.arange(7)[None]}  # one row for all samples
    for _ in range(2):
        assert torch.equal(ask(cache, teacher, odd), teacher.model(**odd).logits)
    assert teacher.asked == 6


def test_its_state_loads_as_weights_only_and_answers_the_same():
    cache, teacher = LogitCache(MIB), Teacher()
    inputs = samples(5, 7)
    expected = ask(cache, teacher, inputs)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other = LogitCache(MIB)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(ask(other, teacher, inputs), expected)
    assert teacher.asked == 5
    empty = LogitCache(MIB)
    empty.load_state_dict(LogitCache(MIB).state_dict())
    assert len(empty) == 0


def test_the_loss_is_that_without_a_cache():
    student, teacher = tiny_bert().double().eval(), tiny_bert(ffn=96).double().eval().requires_grad_(False)
    inputs = samples(4, 7, padding=2) | {"labels": torch.tensor([0, 1, 2, 0])}
    passes = []
    teacher.register_forward_hook(lambda *_: passes.append(1))
    losses = []
    for cache in (None, LogitCache(MIB)):
        loss = DistillationLoss(student, teacher, temperature=2.0, weight=0.5, cache=cache)
        losses += [loss(lambda: student(**inputs).loss)[0].item() for _ in range(2)]
    assert losses[1:] == losses[:1] * 3
    assert len(passes) == 3
