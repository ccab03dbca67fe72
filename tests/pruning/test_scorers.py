from __future__ import annotations

import json
import math

import pytest
import torch

from adaptrain import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from adaptrain.pruning.importance import magnitude_scores
from adaptrain.pruning.scorers import METHODS, ActivationScores, MovementScores, RandomScores, make_scorer
from adaptrain.pruning.surgery import shrink, slices
from tests.pruning.models import MODELS, batch, loss_of
from tests.toys import tiny_bert

KINDS = ("heads", "ffn")
ARCHITECTURES = pytest.mark.parametrize("name", ["bert", "llama", "distilbert"])


def shares(values):
    """Reference: of each value, what it is of itself and all that are greater."""
    return [value / sum(other for other in values if other >= value) if value else 0.0 for value in values]


def mean_activations(model, inputs):
    """Reference: sample by sample, token by token, unit by unit."""
    match = find_family(model)
    outputs, handles = {}, []
    for layer, sizes in enumerate(structures.dimensions(match)):
        for kind in KINDS:
            part = slices(match, layer, kind)[-1]

            def keep(_, given, key=(layer, kind, part.size, sizes[kind])):
                outputs[key] = given[0].detach().clone()

            handles.append(part.linear.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    means = {}
    for (layer, kind, size, count), output in outputs.items():
        means[layer, kind] = []
        for unit in range(count):
            seen = []
            for sample, mask in zip(output, inputs["attention_mask"], strict=True):
                for token, real in zip(sample, mask, strict=True):
                    if real:
                        seen += [abs(float(value)) for value in token[unit * size : (unit + 1) * size]]
            means[layer, kind].append(sum(seen) / len(seen))
    return means


@ARCHITECTURES
def test_activation_equals_the_plain_mean_over_real_tokens(name):
    model = MODELS[name]().double().train()
    match = find_family(model)
    scorer = ActivationScores(match, KINDS, decay=0.5)
    stop = scorer.start()
    expected: dict = {}
    for step in range(3):
        loss_of(model, step)
        for key, means in mean_activations(model, batch(step)).items():
            before = expected.get(key, [0.0] * len(means))
            expected[key] = [0.5 * old + 0.5 * new for old, new in zip(before, means, strict=True)]
        scorer.update()
    stop()
    changes, scores = scorer.changes(), scorer.scores()
    for (layer, kind), values in expected.items():
        values = [value / (1 - 0.5**3) for value in values]
        assert changes[layer][kind] == pytest.approx(values, rel=1e-9)
        assert scores[layer][kind] == pytest.approx(shares(values), rel=1e-9)


def test_activation_of_micro_batches_is_that_of_the_batch():
    whole, parts = tiny_bert().train(), tiny_bert().train()
    inputs = batch(size=4)
    seen = []
    for model, pieces in ((whole, [slice(0, 4)]), (parts, [slice(0, 1), slice(1, 4)])):
        scorer = ActivationScores(find_family(model), KINDS)
        stop = scorer.start()
        for piece in pieces:
            model(**{key: value[piece] for key, value in inputs.items()})
        scorer.update()
        stop()
        seen.append(scorer.changes()[1]["ffn"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_padding_activates_nothing():
    model = tiny_bert().double().train()
    inputs = batch(size=1)
    inputs["attention_mask"][:] = 1
    longer = {key: torch.cat([value, torch.zeros(1, 20, dtype=torch.long)], 1) for key, value in inputs.items()}
    seen = []
    for given in (inputs, longer):
        scorer = ActivationScores(find_family(model), KINDS)
        stop = scorer.start()
        model(given["input_ids"], given["attention_mask"])  # by position, as well
        scorer.update()
        stop()
        seen.append(scorer.scores()[1])
    assert seen[0]["ffn"] == pytest.approx(seen[1]["ffn"], rel=1e-9)
    assert seen[0]["heads"] == pytest.approx(seen[1]["heads"], rel=1e-9)


def test_only_training_activates():
    model = tiny_bert()
    scorer = ActivationScores(find_family(model), KINDS)
    stop = scorer.start()
    model.eval()(**batch())
    with torch.no_grad():
        model.train()(**batch())
    scorer.update()
    assert not scorer.ready
    model(**batch())
    scorer.update()
    assert scorer.ready
    stop()
    model(**batch())
    scorer.update()
    assert scorer.state_dict()["steps"] == 1


def test_activation_refuses_a_mask_that_does_not_tell_padding():
    model = tiny_bert().train()
    scorer = ActivationScores(find_family(model), KINDS)
    stop = scorer.start()
    inputs = batch()
    square = inputs["attention_mask"][:, None, None, :].bool().expand(-1, 1, 12, -1)
    with pytest.raises(ConfigurationError, match="attention_mask of shape"):
        model(inputs["input_ids"], attention_mask=square)
    stop()


@ARCHITECTURES
def test_movement_equals_the_plain_sum(name):
    model = MODELS[name]().double()
    match = find_family(model)
    scorer = MovementScores(match, KINDS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected: dict = {}
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for layer, sizes in enumerate(structures.dimensions(match)):
            for kind in KINDS:
                for unit in range(sizes[kind]):
                    for part in slices(match, layer, kind):
                        lines = slice(unit * part.size, (unit + 1) * part.size)
                        for p in part.parameters():
                            w, g = (t[lines] if part.dim == 0 else t[:, lines] for t in (p.detach(), p.grad))
                            key = layer, kind, unit
                            expected[key] = expected.get(key, 0.0) - float((w * g).sum())
        scorer.update()
        optimizer.step()
    scores = scorer.scores()
    assert min(expected.values()) < 0 < max(expected.values())
    for layer, sizes in enumerate(structures.dimensions(match)):
        for kind in KINDS:
            sums = [expected[layer, kind, unit] for unit in range(sizes[kind])]
            counted = [value - min(sums) for value in sums]
            assert scores[layer][kind] == pytest.approx(shares(counted), rel=1e-7, abs=1e-9)


def test_a_step_without_usable_gradients_moves_nothing():
    model = tiny_bert()
    scorer = MovementScores(find_family(model), KINDS)
    scorer.update()
    assert not scorer.ready
    loss_of(model).backward()
    scorer.update()
    sums = scorer.state_dict()["averages"]
    model.bert.encoder.layer[0].output.dense.weight.grad[0, 0] = float("inf")
    scorer.update()
    assert scorer.state_dict()["averages"] == sums


def test_frozen_layers_do_not_move():
    model = tiny_bert()
    model.bert.encoder.layer[1].attention.self.key.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"importance='movement'.*heads of layer 1 are frozen"):
        MovementScores(find_family(model), KINDS).check()


@pytest.mark.parametrize("method", METHODS)
def test_scores_follow_a_cut_and_a_restart(method):
    model = tiny_bert().train()
    match = find_family(model)
    scorer = make_scorer(method, match, KINDS)
    stop = scorer.start()
    loss_of(model).backward()
    scorer.update()
    keep = structures.dense(match)
    keep[0] = {"heads": [], "ffn": [5, 9, 60]}
    shrink(match, keep)
    loss_of(model, 1).backward()
    scorer.update()
    scores = scorer.scores()
    stop()
    assert all(score == 0 for unit, score in enumerate(scores[0]["ffn"]) if unit not in (5, 9, 60))
    assert sum(score > 0 for score in scores[0]["ffn"]) >= 2  # the one that moved least counts nothing
    assert scores[0]["heads"] == [0.0] * 4
    torch.manual_seed(7)
    other = make_scorer(method, match, KINDS)
    other.load_state_dict(json.loads(json.dumps(scorer.state_dict())))
    assert other.ready
    assert other.scores() == scores


def test_random_scores_treat_layers_alike_and_are_the_runs():
    torch.manual_seed(3)
    match = find_family(tiny_bert())
    scores = RandomScores(match, KINDS).scores()
    for layer in scores:
        for kind in KINDS:
            assert max(layer[kind]) == 1.0
            assert len(set(layer[kind])) == len(layer[kind])
            assert min(layer[kind]) > 0
    assert scores[0] != scores[1]
    assert RandomScores(match, KINDS).scores() == scores
    torch.manual_seed(4)
    assert RandomScores(match, KINDS).scores() != scores


def test_own_scores_are_taken_as_they_are():
    match = find_family(tiny_bert())
    assert make_scorer(magnitude_scores, match, KINDS).scores() == magnitude_scores(match, KINDS)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda match, kinds: [], "0 layers for 2"),
        (lambda match, kinds: [{"heads": [1.0] * 4}] * 2, "0 numbers for the 64 ffn of layer 0"),
        (lambda match, kinds: [{"heads": [1.0] * 3, "ffn": [1.0] * 64}] * 2, "3 numbers for the 4 heads of layer 0"),
        (lambda match, kinds: [{"heads": [1.0] * 4, "ffn": [math.nan] * 64}] * 2, "nan for the ffn of layer 0"),
        (lambda match, kinds: [{"heads": [-1.0] * 4, "ffn": [1.0] * 64}] * 2, "-1.0 for the heads of layer 0"),
    ],
)
def test_own_scores_that_are_none_are_refused(score, message):
    with pytest.raises(ConfigurationError, match=message):
        make_scorer(score, find_family(tiny_bert()), KINDS).scores()
