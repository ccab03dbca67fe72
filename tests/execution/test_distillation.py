from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification, BertLMHeadModel, BertModel

from adaptrain import ConfigurationError
from adaptrain.execution.distillation import DistillationLoss, is_causal
from adaptrain.pruning.families import find_family
from tests.pruning.models import batch
from tests.toys import tiny_bert, tiny_llama

T, W = 3.0, 0.4


def pair(build, **teacher):
    return build().double().train(), build(**(teacher or {"ffn": 96})).double().eval().requires_grad_(False)


def softmax(logits):
    """Reference: of a plain list, at the temperature."""
    powers = [math.exp(value / T) for value in logits]
    return [power / sum(powers) for power in powers]


def divergence(student, teacher, positions):
    """Reference: the mean of KL(teacher ‖ student) over positions, term by term."""
    total = 0.0
    for position in positions:
        ours, theirs = (softmax(logits[position].tolist()) for logits in (student, teacher))
        total += sum(q * math.log(q / p) for p, q in zip(ours, theirs, strict=True))
    return total / len(positions)


def taught(student, teacher, inputs, **arguments):
    loss = DistillationLoss(student, teacher, temperature=T, weight=W, **arguments)
    total, part = loss(lambda: student(**inputs).loss)
    return total, part


def test_a_classifier_equals_the_formula():
    student, teacher = pair(tiny_bert)
    inputs = batch() | {"labels": torch.tensor([0, 1, 2, 0])}
    total, part = taught(student, teacher, inputs)
    output = student(**inputs)
    expected = T**2 * divergence(output.logits, teacher(**inputs).logits, range(4))
    assert float(part) == pytest.approx(expected, rel=1e-9)
    assert total.item() == pytest.approx((1 - W) * output.loss.item() + W * expected, rel=1e-9)
    assert not part.requires_grad


def test_the_gradient_is_the_formulas_and_only_the_students():
    student, teacher = pair(tiny_bert)
    inputs = batch() | {"labels": torch.tensor([0, 1, 2, 0])}
    taught(student, teacher, inputs)[0].backward()
    got = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    student.zero_grad()
    output, goal = student(**inputs), teacher(**inputs).logits
    p, q = (torch.softmax(logits / T, -1) for logits in (output.logits, goal))
    ((1 - W) * output.loss + W * T**2 * (q * (q.log() - p.log())).sum(-1).mean()).backward()
    plain = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert max(float((a - b).abs().max()) for a, b in zip(got, plain, strict=True)) < 1e-12


def test_a_teacher_that_is_the_student_teaches_nothing():
    student, teacher = pair(tiny_bert, ffn=64)
    assert float(taught(student, teacher, batch() | {"labels": torch.tensor([0, 1, 2, 0])})[1]) < 1e-12


def language_inputs(labels_ignored):
    inputs = batch()
    inputs["labels"] = inputs["input_ids"].clone()
    for row, column in labels_ignored:
        inputs["labels"][row, column] = -100
    return inputs


def test_a_causal_model_is_taught_where_a_label_counts():
    student, teacher = pair(tiny_llama)
    ignored = [(0, column) for column in range(6, 12)] + [(1, 0), (2, 5)]
    inputs = language_inputs(ignored)
    positions = [(row, column - 1) for row in range(4) for column in range(1, 12) if (row, column) not in ignored]
    part = taught(student, teacher, inputs)[1]
    expected = T**2 * divergence(student(**inputs).logits, teacher(**inputs).logits, positions)
    assert float(part) == pytest.approx(expected, rel=1e-9)


def test_without_labels_tokens_count_that_are_not_padding():
    student, teacher = pair(tiny_llama)
    inputs = batch()
    loss = DistillationLoss(student, teacher, temperature=T, weight=W)
    part = loss(lambda: student(**inputs).logits.sum())[1]
    positions = [(row, column) for row in range(4) for column in range(11) if inputs["attention_mask"][row, column + 1]]
    expected = T**2 * divergence(student(**inputs).logits, teacher(**inputs).logits, positions)
    assert float(part) == pytest.approx(expected, rel=1e-9)


def test_token_classes_count_where_their_label_does_and_do_not_shift():
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    student, teacher = BertForTokenClassification(config).double().train(), BertForTokenClassification(config).double()
    teacher.eval().requires_grad_(False)
    inputs = batch()
    inputs["labels"] = torch.where(inputs["attention_mask"] == 1, 1, -100)
    positions = [(row, column) for row in range(4) for column in range(12) if inputs["labels"][row, column] == 1]
    expected = T**2 * divergence(student(**inputs).logits, teacher(**inputs).logits, positions)
    assert float(taught(student, teacher, inputs)[1]) == pytest.approx(expected, rel=1e-9)
    assert not is_causal(student)
    assert not is_causal(BertForMaskedLM(config))
    config.is_decoder = True
    assert is_causal(BertLMHeadModel(config))


def test_hidden_states_of_a_classifier_are_compared_by_sample_over_real_tokens():
    student, teacher = pair(tiny_bert)
    inputs = batch() | {"labels": torch.tensor([0, 1, 2, 0])}
    match = find_family(student)
    logits = taught(student, teacher, inputs)[1]
    both = taught(student, teacher, inputs, backbone=match.family.backbone)[1]
    ours, theirs = (model.bert(**batch()).last_hidden_state for model in (student, teacher))
    means = []
    for row in range(4):
        tokens = [column for column in range(12) if inputs["attention_mask"][row, column]]
        squares = [(ours[row, t, unit] - theirs[row, t, unit]).item() ** 2 for t in tokens for unit in range(32)]
        means.append(sum(squares) / len(squares))
    assert float(both - logits) == pytest.approx(sum(means) / 4, rel=1e-9)


def test_hidden_states_of_a_language_model_are_compared_where_a_label_counts():
    student, teacher = pair(tiny_llama)
    ignored = [(0, column) for column in range(6, 12)] + [(2, 5)]
    inputs = language_inputs(ignored)
    backbone = find_family(student).family.backbone
    hidden = taught(student, teacher, inputs, backbone=backbone)[1] - taught(student, teacher, inputs)[1]
    ours, theirs = (model.model(**batch()).last_hidden_state for model in (student, teacher))
    positions = [(row, column - 1) for row in range(4) for column in range(1, 12) if (row, column) not in ignored]
    squares = [(ours[place][unit] - theirs[place][unit]).item() ** 2 for place in positions for unit in range(32)]
    assert float(hidden) == pytest.approx(sum(squares) / len(squares), rel=1e-9)


def test_one_pass_of_each_and_no_hook_left():
    student, teacher = pair(tiny_bert)
    count = {"student": 0, "teacher": 0}
    student.register_forward_hook(lambda *_: count.update(student=count["student"] + 1))
    teacher.register_forward_hook(lambda *_: count.update(teacher=count["teacher"] + 1))
    taught(student, teacher, batch() | {"labels": torch.tensor([0, 1, 2, 0])})
    assert count == {"student": 1, "teacher": 1}
    assert len(student._forward_hooks) == 1


def test_mappings_keep_their_other_keys_and_none_stays_none():
    student, teacher = pair(tiny_bert)
    loss = DistillationLoss(student, teacher, temperature=T, weight=W)
    inputs = batch() | {"labels": torch.tensor([0, 1, 2, 0])}
    result, part = loss(lambda: {"loss": student(**inputs).loss, "other": 7})
    assert result["other"] == 7
    assert result["loss"].item() == pytest.approx(((1 - W) * student(**inputs).loss + W * part).item(), rel=1e-9)
    assert loss(lambda: None) == (None, None)


def test_two_passes_in_a_step_are_both_taught():
    student, teacher = pair(tiny_bert)
    loss = DistillationLoss(student, teacher, temperature=T, weight=W)
    first, second = (batch(seed) | {"labels": torch.tensor([0, 1, 2, 0])} for seed in (0, 1))
    parts = [taught(student, teacher, inputs)[1] for inputs in (first, second)]
    both = loss(lambda: student(**first).loss + student(**second).loss)[1]
    assert float(both) == pytest.approx(float(sum(parts)) / 2, rel=1e-9)


def test_what_cannot_be_taught_says_so():
    student, teacher = pair(tiny_bert)
    loss = DistillationLoss(student, teacher, temperature=T, weight=W)
    with pytest.raises(ConfigurationError, match="training_step did not call it"):
        loss(lambda: torch.ones((), requires_grad=True))
    wide = tiny_bert()
    wide.classifier = torch.nn.Linear(32, 5)
    wide.num_labels = 5
    with pytest.raises(ConfigurationError, match=r"\(4, 5\), the student's \(4, 3\)"):
        taught(student, wide.double(), batch() | {"labels": torch.tensor([0, 1, 2, 0])})
    body = BertModel(tiny_bert().config)
    with pytest.raises(ConfigurationError, match=r"BertModel returns a .* without logits"):
        DistillationLoss(body, body, temperature=T, weight=W)(lambda: body(**batch())[0].sum())
