"""What others keep of a model that is pruned: running averages of it, and what was compiled for its shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adaptrain import CubicSchedule, ProgressivePruning
from adaptrain.pruning import structure as structures
from adaptrain.pruning.checkpoint import load_from_checkpoint
from adaptrain.pruning.families import find_family
from tests.toys import TextModule, ValidatedTextModule, quiet_trainer, text_loader, tiny_bert, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from.*"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint outside.*"),
]

WeightAveraging: Any = getattr(pl.callbacks, "EMAWeightAveraging", None)  # since Lightning 2.6


def pruning(**arguments: Any) -> ProgressivePruning:
    schedule = CubicSchedule(begin=0.35, end=0.7, events=2)
    return ProgressivePruning(**({"target": {"flops": 0.5}, "schedule": schedule, "reconstruct": True} | arguments))


def fit(folder: Path, *, resume: Path | None = None) -> tuple[Any, Any, Any]:
    """Four epochs of six steps, two events, a checkpoint after each epoch."""
    average = WeightAveraging(decay=0.9)
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_epochs=1)
    trainer = quiet_trainer(
        folder, callbacks=[pruning(), average, saving], max_epochs=4, enable_checkpointing=True, num_sanity_val_steps=0
    )
    module = ValidatedTextModule()
    trainer.fit(module, text_loader(), text_loader(), ckpt_path=None if resume is None else str(resume))
    return trainer, module, average


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder)[1]


@pytest.mark.skipif(WeightAveraging is None, reason="needs Lightning 2.6")
@pytest.mark.parametrize("saved", [6, 12, 18])
def test_a_run_with_weight_averaging_resumes_as_if_uninterrupted(whole, tmp_path, saved) -> None:
    folder, expected = whole
    _, module, average = fit(tmp_path, resume=folder / f"step={saved}.ckpt")
    assert module.losses == expected.losses[saved:]
    assert torch.equal(weights(module), weights(expected))  # both hold the average at the end
    shapes = [parameter.shape for parameter in module.parameters()]
    assert [parameter.shape for parameter in average._average_model.module.parameters()] == shapes
    loaded = load_from_checkpoint(ValidatedTextModule, folder / "step=24.ckpt")
    assert [parameter.shape for parameter in loaded.parameters()] == shapes


class WithAverage(TextModule):
    """Keeps an average of its own, beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.average.update_parameters(self.model)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr)


def test_an_average_inside_the_module_keeps_the_same_units(tmp_path) -> None:
    module = WithAverage()
    assert find_family(module).model is module.model
    trainer = quiet_trainer(tmp_path, callbacks=[pruning()], max_epochs=2)
    trainer.fit(module, text_loader())
    kept = structures.current(find_family(module))
    assert structures.current(find_family(module.average.module)) == kept != structures.dense(find_family(module))
    output = module.model.bert.encoder.layer[0].output.dense.weight
    averaged = module.average.module.bert.encoder.layer[0].output.dense.weight
    assert 0 < (averaged - output).abs().max() < 0.1  # the same columns, some steps apart
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = load_from_checkpoint(WithAverage, tmp_path / "x.ckpt")
    assert torch.equal(weights(loaded), weights(module))


def test_the_copy_of_stochastic_weight_averaging_follows(tmp_path) -> None:
    module = TextModule()
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    trainer = quiet_trainer(tmp_path, callbacks=[pruning(), averaging], max_epochs=4)
    trainer.fit(module, text_loader())
    copied: Any = averaging._average_model
    assert structures.current(find_family(copied)) == structures.current(find_family(module))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_a_compiled_model_is_compiled_anew_after_each_event(tmp_path, monkeypatch) -> None:
    plain, compiled = TextModule(), TextModule(torch.compile(tiny_bert(), backend="eager"))
    resets: list[bool] = []
    reset = torch._dynamo.reset
    monkeypatch.setattr(torch._dynamo, "reset", lambda: (resets.append(True), reset()))
    for module, callback in ((plain, pruning(reconstruct=False)), (compiled, pruning())):
        trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2)
        trainer.fit(module, text_loader())
    assert len(resets) == 2
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
