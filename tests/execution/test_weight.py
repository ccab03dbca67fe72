from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from adaptrain import ConfigurationError
from adaptrain.execution.plan import Plan, make_plan
from adaptrain.execution.split import Piece, layout
from adaptrain.execution.weight import sample_weights
from tests.toys import language_model_samples, tiny_bert, tiny_llama


def batch(**extra) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 0, 0], [1, 2, 3, 4]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()} | extra


def test_samples_count_one_without_labels_or_by_choice() -> None:
    assert sample_weights(batch(), 3, "auto") == [1, 1, 1]
    assert sample_weights(batch(labels=torch.tensor([0, -100, 1])), 3, "samples") == [1, 1, 1]
    assert sample_weights(batch(labels=torch.rand(3)), 3, "auto") == [1, 1, 1]  # a regression


def test_ignored_labels_do_not_count() -> None:
    assert sample_weights(batch(labels=torch.tensor([0, -100, 1])), 3, "auto") == [1, 0, 1]
    labels = torch.tensor([[9, -100, 9, -100], [9, 9, -100, -100], [-100] * 4])
    assert sample_weights(batch(labels=labels), 3, "auto") == [2, 2, 0]


def test_a_causal_models_first_label_is_never_predicted() -> None:
    ids = batch()["input_ids"]
    assert sample_weights(batch(labels=ids.masked_fill(ids == 0, -100)), 3, "auto") == [2, 1, 3]


def test_tokens_without_labels_come_from_the_mask() -> None:
    assert sample_weights(batch(), 3, "tokens") == [3, 2, 4]
    with pytest.raises(ConfigurationError, match=r"weight_by='tokens' needs.*it has x\."):
        sample_weights({"x": torch.zeros(3, 2)}, 3, "tokens")


def collated(samples) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate(samples)


def split_gradients(model, whole, size: int, **kwargs) -> torch.Tensor:
    model.zero_grad()
    plan = make_plan(whole, layout(whole, by_length=True), size, **({"weight_by": "auto"} | kwargs))
    for _, micro_batch, share in plan:
        (model(micro_batch) * share).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class TokenMean(torch.nn.Module):
    def __init__(self, *, shift: bool) -> None:
        super().__init__()
        self.bert, self.head, self.shift = tiny_bert().bert, torch.nn.Linear(32, 64), shift
        self.double()

    def forward(self, batch):
        logits = self.head(self.bert(batch["input_ids"], batch["attention_mask"])[0])
        labels = batch["labels"]
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [1, 3, 12])
def test_token_mean_gradients_equal_the_unsplit_ones(size: int, shift: bool) -> None:
    model, whole = TokenMean(shift=shift), collated(language_model_samples(12))
    if not shift:  # a tagger's labels are not its inputs
        whole["labels"] = torch.where(whole["labels"] == -100, -100, whole["labels"] % 7)
    model(whole).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    got = split_gradients(model, whole, size)
    assert (got - expected).norm() <= 1e-12 * expected.norm()


def test_a_hugging_face_causal_model_agrees() -> None:
    llama, whole = tiny_llama().double(), collated(language_model_samples(12))

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = llama

        def forward(self, batch):
            return self.llama(**batch).loss

    model = Loss()
    model(whole).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    # The model computes its norms and its loss in fp32.
    assert (split_gradients(model, whole, 5) - expected).norm() <= 1e-6 * expected.norm()


def test_a_micro_batch_in_which_nothing_counts_is_left_out() -> None:
    whole = batch(labels=torch.tensor([0, -100, 1]))
    plan = make_plan(whole, layout(whole, by_length=True), 1, weight_by="auto")
    assert [share for _, _, share in plan] == [0.5, 0.5]


def test_where_nothing_counts_at_all_every_micro_batch_runs() -> None:
    whole = batch(labels=torch.tensor([-100, -100, -100]))
    plan = make_plan(whole, layout(whole, by_length=True), 1, weight_by="auto")
    assert len(list(plan)) == 3


def test_a_users_split_must_return_something_that_can_be_weighed() -> None:
    with pytest.raises(ConfigurationError, match="no micro-batch"):
        make_plan([1, 2], None, 1, weight_by="auto", split=lambda batch, size: [])
    with pytest.raises(ConfigurationError, match="callable that returns a micro-batch's weight"):
        make_plan([1, 2], None, 1, weight_by="auto", split=lambda batch, size: [["a"], ["b"]])


def test_outputs_are_joined_in_the_loaders_order_with_trimmed_columns_filled() -> None:
    whole = batch()
    plan = make_plan(whole, layout(whole, by_length=True), 1, weight_by="auto")
    outputs = [
        (number, {"ids": piece["input_ids"], "mean": piece["input_ids"].double().mean(), "text": "x"})
        for number, piece, _ in plan
    ]
    joined = plan.join(outputs)
    assert torch.equal(joined["ids"], whole["input_ids"])
    assert float(joined["mean"]) == pytest.approx((6 + 5.5 + 2.5) / 3)
    assert joined["text"] == ["x", "x", "x"]


def joined_outputs(outputs: list, sizes: list[int], weights: list[float] | None = None):
    bounds = [0, *itertools.accumulate(sizes)]
    pieces = [Piece(pair, None, 1) for pair in itertools.pairwise(bounds)]
    plan = Plan(lambda: iter(()), weights or [float(size) for size in sizes], pieces)
    return plan.join(list(enumerate(outputs)))


def test_nested_outputs_are_joined_entry_by_entry() -> None:
    first = {"a": (torch.zeros(2, 3), [np.zeros(2)]), "b": ["x", "y"], "none": None}
    second = {"a": (torch.ones(1, 3), [np.ones(1)]), "b": ["z"], "none": None}
    joined = joined_outputs([first, second], [2, 1])
    assert joined["a"][0].tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3]
    assert joined["a"][1][0].tolist() == [0.0, 0.0, 1.0]
    assert (joined["b"], joined["none"]) == (["x", "y", "z"], None)
    assert isinstance(joined["a"], tuple)


def test_lists_with_an_entry_per_sample_are_told_from_lists_of_tensors() -> None:
    per_sample = [[torch.zeros(5), torch.zeros(7)], [torch.zeros(3)]]
    assert [len(entry) for entry in joined_outputs(per_sample, [2, 1])] == [5, 7, 3]
    heads = [[torch.zeros(2, 4), torch.zeros(2)], [torch.zeros(1, 4), torch.zeros(1)]]
    assert [tuple(entry.shape) for entry in joined_outputs(heads, [2, 1])] == [(3, 4), (3,)]


def test_what_cannot_be_joined_is_a_list_with_an_entry_per_micro_batch() -> None:
    assert joined_outputs(["val", "val"], [2, 1]) == ["val", "val"]
    lengths = [torch.zeros(2, 5), torch.zeros(1, 4)]  # such as generated sequences
    assert joined_outputs(lengths, [2, 1]) == lengths
    arrays = [np.zeros((2, 5)), np.zeros((1, 4))]
    assert joined_outputs(arrays, [2, 1]) == arrays
    assert joined_outputs([{"a": 1.0}, None], [2, 1]) == [{"a": 1.0}, None]


def test_a_mean_leaves_out_what_counts_nothing() -> None:
    assert joined_outputs([torch.tensor(2.0), torch.tensor(float("nan"))], [2, 1], [2.0, 0.0]) == 2.0
    assert joined_outputs([1.0, 4.0], [2, 1]) == pytest.approx(2.0)


def test_numpy_rows_come_back_in_the_loaders_order() -> None:
    whole = batch()
    plan = make_plan(whole, layout(whole, by_length=True), 1, weight_by="auto")
    outputs = [(n, {"array": m["input_ids"][:, :1].numpy(), "list": m["input_ids"][:, 0].tolist()}) for n, m, _ in plan]
    joined = plan.join(outputs)
    assert joined["array"][:, 0].tolist() == joined["list"] == whole["input_ids"][:, 0].tolist()
