from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from adaptrain import ConfigurationError
from adaptrain.execution.plan import make_plan
from adaptrain.execution.split import layout
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
