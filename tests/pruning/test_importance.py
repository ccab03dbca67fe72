from __future__ import annotations

import json

import pytest
import torch

from adaptrain import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from adaptrain.pruning.importance import TaylorScores, layer_adaptive, magnitude_scores
from adaptrain.pruning.surgery import shrink, slices
from tests.pruning.models import MODELS, batch, loss_of
from tests.toys import tiny_bert

KINDS = ("heads", "ffn")


def gate_gradients(model, seed):
    """Reference: the gradient of a gate of 1 on each unit's output, by autograd, through forward pre-hooks."""
    match = find_family(model)
    gates, handles = {}, []
    for layer, sizes in enumerate(structures.dimensions(match)):
        for kind in KINDS:
            part = slices(match, layer, kind)[-1]
            gate = gates[layer, kind] = torch.ones(sizes[kind], dtype=torch.float64, requires_grad=True)

            def multiply(module, inputs, gate=gate, size=part.size):
                return (inputs[0] * gate.repeat_interleave(size),)

            handles.append(part.linear.register_forward_pre_hook(multiply))
    loss_of(model, seed).backward()
    for handle in handles:
        handle.remove()
    return {key: gate.grad for key, gate in gates.items()}


def shares(values: list[float], worth: float = 1.0) -> list[float]:
    """Reference: of each value, what it is of itself and all that are greater."""
    return [worth * value / sum(other for other in values if other >= value) for value in values]


@pytest.mark.parametrize("name", ["bert", "llama", "distilbert"])
def test_taylor_equals_the_gradient_of_a_gate(name) -> None:
    model = MODELS[name]().double()
    scorer = TaylorScores(find_family(model), KINDS, decay=0.5)
    expected: dict = {}
    together: dict = {}
    for step in range(3):
        model.zero_grad()
        for key, gradient in gate_gradients(model, step).items():
            expected[key] = 0.5 * expected.get(key, 0) + 0.5 * gradient.abs()
            together[key] = 0.5 * together.get(key, 0) + 0.5 * float(gradient.sum().abs())
        scorer.update()
    changes, scores = scorer.changes(), scorer.scores()
    for (layer, kind), value in expected.items():
        assert changes[layer][kind] == pytest.approx((value / (1 - 0.5**3)).tolist(), rel=1e-9)
        worth = together[layer, kind] / (1 - 0.5**3)
        assert scores[layer][kind] == pytest.approx(shares(value.tolist(), worth), rel=1e-9)


def test_taylor_foretells_the_change_of_the_loss() -> None:
    model = tiny_bert().double()
    with torch.no_grad():  # small units, so that the first order is what matters
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight.mul_(1e-3)
    match = find_family(model)
    scorer = TaylorScores(match, ("ffn",))
    loss = loss_of(model)
    loss.backward()
    scorer.update()
    foretold = scorer.changes()[0]["ffn"][7]
    keep = structures.dense(match)
    keep[0]["ffn"].remove(7)
    shrink(match, keep)
    assert abs(float((loss_of(model) - loss).detach())) == pytest.approx(foretold, rel=1e-2)


def test_padding_counts_for_nothing() -> None:
    short, padded = tiny_bert().double(), tiny_bert().double()
    inputs = batch(size=1)
    inputs["attention_mask"][:] = 1
    longer = {name: torch.cat([tensor, torch.zeros(1, 20, dtype=torch.long)], 1) for name, tensor in inputs.items()}
    scores = []
    for model, given in ((short, inputs), (padded, longer)):
        model(**given, labels=torch.tensor([1])).loss.backward()
        scorer = TaylorScores(find_family(model), KINDS)
        scorer.update()
        scores.append(scorer.scores()[1]["ffn"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


def test_scores_follow_a_cut_and_stay_at_original_places() -> None:
    model = tiny_bert()
    match = find_family(model)
    scorer = TaylorScores(match, KINDS)
    loss_of(model).backward()
    scorer.update()
    before = scorer.changes()[0]["ffn"]
    keep = structures.dense(match)
    keep[0]["ffn"] = [5, 9, 60]
    shrink(match, keep)
    after = scorer.changes()[0]["ffn"]
    assert [unit for unit, score in enumerate(after) if score] == [5, 9, 60]
    assert [after[unit] for unit in (5, 9, 60)] == [before[unit] for unit in (5, 9, 60)]
    scorer.update()
    assert scorer.ready


def test_steps_without_usable_gradients_are_left_out() -> None:
    model = tiny_bert()
    scorer = TaylorScores(find_family(model), KINDS)
    scorer.update()
    assert not scorer.ready
    loss_of(model).backward()
    scorer.update()
    averages = scorer.state_dict()["averages"]
    model.bert.encoder.layer[0].output.dense.weight.grad[0, 0] = float("nan")
    scorer.update()
    assert scorer.state_dict()["averages"] == averages


def test_state_is_plain_and_exact() -> None:
    model = tiny_bert()
    scorer, other = (TaylorScores(find_family(model), KINDS) for _ in range(2))
    loss_of(model).backward()
    scorer.update()
    other.load_state_dict(json.loads(json.dumps(scorer.state_dict())))
    scorer.update()
    other.update()
    assert other.scores() == scorer.scores()


def test_frozen_layers_have_no_taylor_score() -> None:
    model = tiny_bert()
    model.bert.encoder.layer[1].requires_grad_(False)
    with pytest.raises(ConfigurationError, match="heads of layer 1 are frozen"):
        TaylorScores(find_family(model), KINDS).check()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_magnitude_equals_the_plain_norm(name) -> None:
    model = MODELS[name]().double()
    match = find_family(model)
    with torch.no_grad():
        model.get_parameter(next(n for n, _ in model.named_parameters() if "layer" in n and "weight" in n)).mul_(10)
    scores = magnitude_scores(match, KINDS)
    for layer, sizes in enumerate(structures.dimensions(match)):
        for kind in KINDS:
            norms = []
            for unit in range(sizes[kind]):
                total = 0.0
                for part in slices(match, layer, kind):
                    lines = slice(unit * part.size, (unit + 1) * part.size)
                    for p in part.parameters():
                        total += float((p[lines] if part.dim == 0 else p[:, lines]).detach().pow(2).sum())
                norms.append(total**0.5)
            assert scores[layer][kind] == pytest.approx(shares(norms))


def test_the_last_unit_of_a_layer_counts_for_all_of_it() -> None:
    scores = layer_adaptive([3.0, 1.0, 2.0, 9.0], [0, 1, 2], worth=2.0)  # the last one is gone already
    assert scores == pytest.approx([2.0, 2 * 1 / 6, 2 * 2 / 5, 0.0])
    assert layer_adaptive([0.0, 0.0], [0, 1]) == [0.0, 0.0]
    assert layer_adaptive([], []) == []


def test_no_layer_is_emptied_while_others_are_whole() -> None:
    """Equal values everywhere: half of all goes as a half of each layer and kind, whatever their scales."""
    layers = [layer_adaptive([scale] * 64, range(64)) for scale in (1e-3, 1.0, 1e3)]
    ranked = sorted((score, layer) for layer, scores in enumerate(layers) for score in scores)
    gone = [layer for _, layer in ranked[: len(ranked) // 2]]
    assert [gone.count(layer) for layer in range(3)] == [32, 32, 32]
