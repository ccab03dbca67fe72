from __future__ import annotations

import pytest
import torch

from adaptrain import BatchSizeController, ConfigurationError, ElasticTraining, FamilyCheckpoint, ModelFamily
from adaptrain.callbacks.base import decision_log
from tests.family.conftest import RankedModule, fit_family, pruning
from tests.toys import TextModule, language_model_samples, quiet_trainer, text_loader, tiny_llama, weights

LEVELS = {"levels": (0.8, 0.6), "cost": "flops"}


def test_every_network_is_a_member_and_is_stored_with_the_model(tmp_path):
    trainer, module = fit_family(tmp_path, [ElasticTraining(**LEVELS), FamilyCheckpoint()])
    (decision,) = (each for each in decision_log(trainer) if each.knob == "elastic")
    assert (decision.old, decision.new) == (1, 3)
    family = ModelFamily.load(tmp_path)
    assert [member.name for member in family] == ["final", "elastic-1", "elastic-2"]
    flops = {name: cost["flops"] for name, cost in family.measure().items()}
    shares = [flops[name] / flops["final"] for name in ("elastic-1", "elastic-2")]
    assert shares == pytest.approx(decision.readings["flops"], rel=0.02)
    assert shares[0] <= 0.8
    assert shares[1] <= 0.6

    # One set of weights, on disk and in memory: the smaller are what the whole begins with.
    assert [path.name for path in (tmp_path / "family").glob("*.safetensors")].count("elastic-1.safetensors") == 0
    whole, small = family["final"].model(), family["elastic-2"].model()
    assert torch.equal(weights(whole), weights(module))
    for name, parameter in small.named_parameters():
        larger = whole.get_parameter(name)
        assert torch.equal(parameter, larger[tuple(slice(size) for size in parameter.shape)])
        if parameter.numel():
            assert parameter.data_ptr() == larger.data_ptr()


def test_the_smaller_networks_learn(tmp_path):
    fit_family(tmp_path / "elastic", [ElasticTraining(**LEVELS), FamilyCheckpoint()])
    family = ModelFamily.load(tmp_path / "elastic")
    assert family["elastic-2"].metric > 0.8  # of three classes; the whole model has about 1


def test_micro_batches_give_the_same(tmp_path):
    found = []
    for others in ([], [BatchSizeController(micro_batch_size=3)]):
        module = RankedModule().double()
        fit_family(tmp_path / f"run{len(found)}", [*others, ElasticTraining(**LEVELS)], module=module, max_epochs=2)
        found.append(weights(module))
    assert torch.allclose(*found, rtol=1e-6, atol=1e-9)


def test_language_models_too(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[ElasticTraining(**LEVELS), FamilyCheckpoint()], max_epochs=2)
    module = TextModule(tiny_llama())
    trainer.fit(module, text_loader(language_model_samples()))
    assert len(ModelFamily.load(tmp_path)) == 3
    assert module.losses[-1] < module.losses[0]


def test_what_cannot_be_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match="ProgressivePruning cuts it"):
        fit_family(tmp_path, [ElasticTraining(**LEVELS), pruning()])
    with pytest.raises(ConfigurationError, match=r"budget.flops=0.001 cannot be met"):
        fit_family(tmp_path, [ElasticTraining(levels=(0.001,), cost="flops")])
