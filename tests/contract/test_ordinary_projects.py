"""Every callback in projects that are ordinary, but other than the toy run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import BaseFinetuning, StochasticWeightAveraging
from torch.utils.data import DataLoader, IterableDataset

import adaptrain
from tests.contract.runs import EPOCHS, STEPS, fit
from tests.contract.settings import SETTINGS, Setting
from tests.toys import TextModule, quiet_trainer, text_samples, tiny_bert

each = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
PLANS_ALONG_THE_RUN = {"ProgressivePruning", "WeightPruning", "LayerFreezing", "ElasticTraining", "WeightSoup"}
MEASURED_AT_A_SHAPE = {"ProgressivePruning", "WeightPruning", "ElasticTraining", "Quantization", "FamilyCheckpoint"}


class Unfreezes(BaseFinetuning):
    """Trains the head alone at first; embeddings and pooler join the optimizer after an epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.model.bert.embeddings, pl_module.model.bert.pooler])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            modules = [pl_module.model.bert.embeddings, pl_module.model.bert.pooler]
            self.unfreeze_and_add_param_group(modules, optimizer)


class PartlyOptimized(TextModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from text_samples(48, variable=False)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@each
def test_it_acts_in_other_precisions(setting: Setting, precision: str, tmp_path):
    result = fit(tmp_path, [setting.build()], precision=precision)
    assert result["step"] == STEPS
    assert setting.knobs <= {d["knob"] for d in result["decisions"] if d["applied"]}
    assert torch.tensor(result["weights"]).isfinite().all()


@each
def test_parameters_may_join_the_optimizer_later(setting: Setting, tmp_path):
    if setting.name == "LowRankAdapters":
        pytest.skip("it says itself what trains")
    joined = Unfreezes()
    result = fit(tmp_path, [setting.build(), joined], module=PartlyOptimized(tiny_bert(dropout=0.0)))
    assert result["step"] == STEPS
    assert setting.knobs <= {d["knob"] for d in result["decisions"] if d["applied"]}


@each
def test_a_scheduler_may_be_made_in_the_middle_of_training(setting: Setting, tmp_path):
    if setting.name == "LowRankAdapters":
        pytest.skip("it refuses running averages, which Lightning copies before the adapters are there")
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=EPOCHS - 1)
    result = fit(tmp_path, [setting.build(), averaging])
    assert result["step"] == STEPS


def stream(setting: Setting, folder: Any, arguments: Any, **settings: Any) -> Any:
    trainer = quiet_trainer(folder, callbacks=[setting.build(**arguments)], **settings)
    return trainer, lambda: trainer.fit(TextModule(), DataLoader(Stream(), batch_size=8))


@each
def test_a_loader_without_a_length_is_served_where_nothing_depends_on_it_and_refused_else(setting: Setting, tmp_path):
    arguments = {"importance": "uniform"} if setting.name == "LowRankAdapters" else {}
    arguments |= {"latency_input": (4, 16)} if setting.name in MEASURED_AT_A_SHAPE else {}
    trainer, fit_it = stream(setting, tmp_path, arguments, max_epochs=-1, max_steps=STEPS)
    fit_it()
    assert trainer.global_step == STEPS
    trainer, fit_it = stream(setting, tmp_path, arguments, max_epochs=3)
    if setting.name in PLANS_ALONG_THE_RUN:
        with pytest.raises(adaptrain.ConfigurationError, match=rf"{setting.name} plans along.*max_epochs=3.*WallClock"):
            fit_it()
        assert trainer.global_step == 0
    else:
        fit_it()
        assert trainer.global_step == STEPS


@pytest.mark.parametrize("name", sorted(MEASURED_AT_A_SHAPE))
def test_a_shape_that_data_does_not_show_is_asked_for_before_training(name: str, tmp_path):
    trainer, fit_it = stream(SETTINGS[name], tmp_path, {"latency_input": None}, max_epochs=-1, max_steps=STEPS)
    with pytest.raises(adaptrain.ConfigurationError, match=r"latency_input=\(batch, sequence\)"):
        fit_it()
    assert trainer.global_step == 0
