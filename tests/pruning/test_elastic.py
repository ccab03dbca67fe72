from __future__ import annotations

import random

import pytest
import torch

from adaptrain.pruning import structure as structures
from adaptrain.pruning.elastic import SubNetwork, as_prefixes, cut_out, importance_order
from adaptrain.pruning.families import find_family
from adaptrain.pruning.surgery import permute
from tests.pruning.models import MODELS, batch, forward


def prefix(match):
    return [
        {kind: units[: max(1, len(units) // 2)] for kind, units in layer.items()} for layer in structures.current(match)
    ]


def outputs(model):
    with torch.no_grad():
        return forward(model, batch())


def some_order(match):
    generator = random.Random(0)
    sizes = [{kind: len(units) for kind, units in layer.items()} for layer in structures.current(match)]
    return [{kind: generator.sample(range(size), size) for kind, size in layer.items()} for layer in sizes]


@pytest.mark.parametrize("name", MODELS)
def test_another_order_computes_the_same(name):
    match = find_family(MODELS[name]().double().eval())
    before = outputs(match.model)
    weights = {key: value.clone() for key, value in match.model.state_dict().items()}
    permute(match, some_order(match))
    assert torch.allclose(outputs(match.model), before, rtol=1e-12, atol=1e-12)
    assert any(not torch.equal(value, weights[key]) for key, value in match.model.state_dict().items())


def test_the_optimizer_follows_the_order():
    def trained(reorder: bool):
        match = find_family(MODELS["bert"]().double().eval())
        optimizer = torch.optim.AdamW(match.model.parameters(), lr=1e-2)
        for step in range(4):
            match.model(**batch()).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if reorder and step == 1:
                permute(match, some_order(match), [optimizer])
        return outputs(match.model)

    assert torch.allclose(trained(True), trained(False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_inside_is_the_model_cut_down(name):
    match = find_family(MODELS[name]().double().eval())
    structure = prefix(match)
    network, alone = SubNetwork(match, structure), cut_out(match, structure)
    inputs = batch()
    if match.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    assert torch.allclose(network(**inputs).logits, alone.model(**inputs).logits, rtol=1e-12, atol=1e-12)

    network(**inputs).logits.square().sum().backward()
    alone.model(**inputs).logits.square().sum().backward()
    ours = {key: p.grad for key, p in match.model.named_parameters()}
    for key, parameter in alone.model.named_parameters():
        if parameter.numel() and parameter.grad is not None:
            gradient = ours[key]
            assert gradient is not None
            assert float(gradient.norm()) == pytest.approx(float(parameter.grad.norm()), rel=1e-9, abs=1e-12)


def test_a_network_inside_follows_the_models_weights_and_mode():
    match = find_family(MODELS["bert"]())
    network = SubNetwork(match, prefix(match))
    match.model.eval()
    before = network(**batch()).logits
    with torch.no_grad():
        match.model.classifier.bias += 1
    assert torch.allclose(network(**batch()).logits, before + 1, atol=1e-6)


def test_the_order_is_by_importance_and_prefixes_keep_the_widths():
    match = find_family(MODELS["bert"]())
    scores = [
        {kind: [float(unit % 3) for unit in units] for kind, units in layer.items()}
        for layer in structures.current(match)
    ]
    order = importance_order(match, scores)
    for layer, kinds in zip(order, scores, strict=True):
        for kind, places in layer.items():
            sorted_scores = [kinds[kind][place] for place in places]
            assert sorted_scores == sorted(sorted_scores, reverse=True)
    some = structures.current(match)
    some[0]["ffn"] = some[0]["ffn"][5::2]
    prefixes = as_prefixes(match, some)
    assert structures.widths(prefixes) == structures.widths(some)
    assert prefixes[0]["ffn"] == list(range(len(some[0]["ffn"])))
