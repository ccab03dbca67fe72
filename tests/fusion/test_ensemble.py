from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptrain import ConfigurationError
from adaptrain.fusion import Ensemble
from tests.fusion.test_merging import tuned
from tests.toys import text_loader, tiny_bert


def batch() -> dict[str, torch.Tensor]:
    inputs = dict(next(iter(text_loader())))
    del inputs["labels"]
    return inputs


def test_it_averages_probabilities_or_logits_by_weight() -> None:
    models, inputs = [tuned(1), tuned(2)], batch()
    with torch.no_grad():
        said = [model(**inputs).logits for model in models]
        mean = Ensemble(models)(**inputs)
        assert torch.allclose(mean.probabilities, (said[0].softmax(-1) + said[1].softmax(-1)) / 2)
        assert torch.allclose(mean.logits.softmax(-1), mean.probabilities)
        weighted = Ensemble(models, weights=[3, 1], combine="logits")(**inputs)
    assert torch.allclose(weighted.logits, 0.75 * said[0] + 0.25 * said[1], atol=1e-6)


# Torch has no batching rule for attention on the CPU, and says that it loops there.
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule.*"
)
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_vectorized_it_says_the_same(combine) -> None:
    models, inputs = [tuned(1), tuned(2), tuned(3)], batch()
    with torch.no_grad():
        one_by_one = Ensemble(models, combine=combine)(**inputs)
        together = Ensemble(models, combine=combine, vectorize=True)(**inputs)
    assert torch.allclose(one_by_one.logits, together.logits, atol=1e-5)


def test_models_of_other_architecture_answer_together_but_not_vectorized() -> None:
    models = [tiny_bert().eval(), tiny_bert(layers=3).eval()]
    assert Ensemble(models)(**batch()).probabilities.shape == (8, 3)
    with pytest.raises(ConfigurationError, match="models of one class"):
        Ensemble(models, vectorize=True)


def test_plain_modules_and_their_dtype() -> None:
    ensemble = Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)]).double()
    assert ensemble(torch.randn(2, 4).double()).probabilities.dtype == torch.float64
    assert len(list(ensemble.parameters())) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": []}, "at least one"),
        ({"models": [nn.Linear(1, 1)], "combine": "votes"}, "'votes'"),
        ({"models": [nn.Linear(1, 1)], "weights": [1, 2]}, "each of the 1 models"),
        ({"models": [nn.Linear(1, 1)], "weights": [-1]}, "at least 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Ensemble(**arguments)


def test_answers_of_other_shapes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"one shape, got \(2, 3\), \(2, 4\)"):
        Ensemble([nn.Linear(4, 3), nn.Linear(4, 4)])(torch.randn(2, 4))
