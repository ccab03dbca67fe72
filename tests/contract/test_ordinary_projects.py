"""Every callback in projects that are ordinary, but other than the toy run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import BaseFinetuning, StochasticWeightAveraging
from torch.utils.data import DataLoader, IterableDataset

import adaptrain
from adaptrain.pruning.families import find_family
from adaptrain.pruning.structure import is_pruned
from tests.contract.runs import EPOCHS, STEPS, fit
from tests.contract.settings import SETTINGS, Setting
from tests.toys import TextModule, quiet_trainer, text_samples, tiny_bert, weights

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


class MakesItsModelLater(TextModule):
    """Makes its model in Lightning's hook for it, and another one each time, which Lightning advises against."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity())

    def configure_model(self) -> None:
        self.model = tiny_bert(dropout=0.0)


class WithItsOwnTeacher(TextModule):
    """Two models of one architecture: one is trained, and hears from the other as well, which is not."""

    adaptrain_model = "model"

    def __init__(self) -> None:
        super().__init__(tiny_bert(dropout=0.0))
        self.teacher = tiny_bert(dropout=0.0).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        output, taught = self.model(**batch), self.teacher(**batch).logits
        loss = output.loss + torch.nn.functional.mse_loss(output.logits, taught)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss


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


@each
def test_a_model_may_be_made_in_the_hook_for_it(setting: Setting, tmp_path):
    module = MakesItsModelLater()
    result = fit(tmp_path, [setting.build()], module=module)
    assert result["step"] == STEPS
    assert setting.knobs <= {d["knob"] for d in result["decisions"] if d["applied"]}
    assert "configure_model" not in vars(module)  # it has its hook back
    if "structure" in setting.knobs:
        assert any(map(is_pruned, module.modules()))


@each
def test_a_module_of_several_models_says_which_is_meant(setting: Setting, tmp_path):
    module = WithItsOwnTeacher()
    teacher = [parameter.clone() for parameter in module.teacher.parameters()]
    result = fit(tmp_path, [setting.build()], module=module)
    assert result["step"] == STEPS
    assert setting.knobs <= {d["knob"] for d in result["decisions"] if d["applied"]}
    assert all(torch.equal(old, new) for old, new in zip(teacher, module.teacher.parameters(), strict=True))


@pytest.mark.parametrize("build", [MakesItsModelLater, WithItsOwnTeacher])
def test_what_was_pruned_in_such_a_module_is_resumed_and_loaded(build: Any, tmp_path):
    pruning = SETTINGS["ProgressivePruning"]
    whole, again = build(), build()
    expected = fit(tmp_path, [pruning.build()], module=whole)
    assert fit(tmp_path, [pruning.build()], module=again, resume=True)["weights"] == expected["weights"]
    assert len(again.losses) < STEPS
    loaded = adaptrain.load_from_checkpoint(build, tmp_path / "checkpoints" / "last.ckpt")
    assert len(weights(loaded)) == len(weights(whole))
    assert find_family(loaded).model is loaded.model


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
