from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from torch import nn

from adaptrain.pruning import structure as structures
from adaptrain.pruning.dropout import scale_dropout
from adaptrain.pruning.families import find_family
from adaptrain.pruning.surgery import resize, shrink
from tests.pruning.models import MODELS, dropout_rates
from tests.toys import tiny_bert


def matrices(layer: nn.Module) -> int:
    """Of BERT, whose layers have no other."""
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)


def cut(match: Any, *widths: tuple[int, int]) -> None:
    shrink(match, [{"heads": list(range(heads)), "ffn": list(range(ffn))} for heads, ffn in widths])


def test_it_falls_with_the_root_of_a_layers_matrices_and_with_nothing_else() -> None:
    model = tiny_bert(layers=3, dropout=0.2)
    match = find_family(model)
    dense = matrices(match.layers[0])
    cut(match, (1, 64), (4, 64), (0, 0))
    scale_dropout(match)
    assert dropout_rates(match.layers[0]) == pytest.approx([0.2 * math.sqrt(matrices(match.layers[0]) / dense)] * 3)
    assert dropout_rates(match.layers[1]) == [0.2] * 3
    assert set(dropout_rates(match.layers[2])) == {0}
    assert model.dropout.p == model.bert.embeddings.dropout.p == 0.2


def test_it_follows_from_event_to_event_and_back() -> None:
    at_once, in_turns = tiny_bert(dropout=0.1), tiny_bert(dropout=0.1)
    for widths in ([(3, 40), (4, 20)], [(1, 8), (0, 8)]):
        cut(find_family(in_turns), *widths)
        scale_dropout(find_family(in_turns))
        scale_dropout(find_family(in_turns))  # nothing more comes of it
    cut(find_family(at_once), (1, 8), (0, 8))
    scale_dropout(find_family(at_once))
    assert dropout_rates(in_turns) == dropout_rates(at_once)
    again = copy.deepcopy(in_turns)
    resize(find_family(again), structures.dense(find_family(again)))
    scale_dropout(find_family(again), followed=True)
    assert set(dropout_rates(again)) == {0.1}
    untouched = tiny_bert(dropout=0.1)
    cut(find_family(untouched), (1, 8), (0, 8))
    scale_dropout(find_family(untouched), followed=True)
    assert set(dropout_rates(untouched)) == {0.1}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_its_dropout_found(name: str) -> None:
    model = MODELS[name]()
    match = find_family(model)
    for layer in match.layers:
        for module in layer.modules():
            for attribute in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.5)
    keep = structures.dense(match)
    for kept in keep:
        kept["ffn"] = kept["ffn"][::2]
    shrink(match, keep)
    scale_dropout(match)
    for layer in match.layers:
        found = dropout_rates(layer) + [m.attention_dropout for m in layer.modules() if hasattr(m, "attention_dropout")]
        assert found
        assert 0 < found[0] < 0.5
        assert set(found) == {found[0]}
