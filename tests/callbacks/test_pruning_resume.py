"""A pruned run that is killed and resumed in another process equals one that was not. Also its script."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from adaptrain import ConfigurationError, CubicSchedule, ProgressivePruning, load_from_checkpoint
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from tests.processes import Python
from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, tiny_bert, weights

pytestmark = [
    # Tests read and write checkpoints across runs and folders on purpose.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from.*"),
]

EPOCHS = 4  # of 6 steps; the events come after steps 9 and 17, a checkpoint after each epoch


class KillAt(pl.Callback):
    """SIGKILL, with no chance to clean up, after `step` optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def callback(**arguments: Any) -> ProgressivePruning:
    schedule = CubicSchedule(begin=0.35, end=0.7, events=2)
    return ProgressivePruning(**({"target": {"flops": 0.5}, "schedule": schedule, "reconstruct": True} | arguments))


def fit(folder: Path, *, kill_at: int | None = None, resume: Path | None = None, **arguments: Any) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_epochs=1)
    extra = [] if kill_at is None else [KillAt(kill_at)]
    trainer = quiet_trainer(
        folder, callbacks=[callback(**arguments), saving, *extra], max_epochs=EPOCHS, enable_checkpointing=True
    )
    module = TextModule()
    trainer.fit(module, text_loader(), ckpt_path=None if resume is None else str(resume))
    return trainer, module


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    return folder, *fit(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[int, Path]:
    """Two runs, killed one step before an event and between two."""
    folders = {kill_at: tmp_path_factory.mktemp(f"killed{kill_at}") for kill_at in (8, 14)}
    processes = {kill_at: Python("-m", __name__, folder, kill_at) for kill_at, folder in folders.items()}
    for process in processes.values():
        assert process.wait().returncode == -signal.SIGKILL
    return folders


@pytest.mark.parametrize(("kill_at", "saved"), [(8, 6), (14, 12)])
def test_killed_and_resumed_equals_uninterrupted(whole, killed, kill_at, saved) -> None:
    _, _, expected = whole
    _, module = fit(killed[kill_at], resume=killed[kill_at] / f"step={saved}.ckpt")
    assert module.losses == expected.losses[saved:]
    assert torch.equal(weights(module), weights(expected))
    assert structures.current(find_family(module)) == structures.current(find_family(expected))


def test_resumed_after_the_last_event(whole, tmp_path) -> None:
    folder, trainer, expected = whole
    _, module = fit(tmp_path, resume=folder / "step=18.ckpt")
    assert module.losses == expected.losses[18:]
    assert torch.equal(weights(module), weights(expected))
    assert trainer.callbacks[0].report()["events"] == 2


@pytest.mark.parametrize("importance", ["activation", "movement", "random"])
def test_scores_resume(tmp_path, importance) -> None:
    _, expected = fit(tmp_path / "whole", importance=importance)
    _, module = fit(tmp_path / "resumed", resume=tmp_path / "whole" / "step=12.ckpt", importance=importance)
    assert module.losses == expected.losses[12:]
    assert torch.equal(weights(module), weights(expected))


def test_a_dry_run_resumes(tmp_path) -> None:
    _, expected = fit(tmp_path / "whole", dry_run=True)
    trainer, module = fit(tmp_path / "resumed", resume=tmp_path / "whole" / "step=12.ckpt", dry_run=True)
    assert module.losses == expected.losses[12:]
    assert trainer.callbacks[0].report()["final"]["params"] == trainer.callbacks[0].report()["dense"]["params"]


@pytest.mark.parametrize("saved", [6, 12, 24])
def test_every_checkpoint_loads_without_a_trainer(whole, saved) -> None:
    folder, _, expected = whole
    module = load_from_checkpoint(TextModule, folder / f"step={saved}.ckpt", weights_only=True)
    assert type(module) is TextModule
    stored = torch.load(folder / f"step={saved}.ckpt", weights_only=True)
    assert structures.current(find_family(module)) == stored["adaptrain_structure"]["layers"]
    for name, value in module.state_dict().items():
        assert torch.equal(value, stored["state_dict"][name])
    if saved == 24:
        assert torch.equal(weights(module), weights(expected))


class ModuleWithTest(TextModule):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.model(**batch).loss)


@pytest.mark.parametrize("saved", [6, 24])
@pytest.mark.parametrize("start", ["dense", "pruned"])
def test_a_trainer_tests_any_checkpoint_with_any_module(whole, tmp_path, saved, start) -> None:
    folder, *_ = whole
    path = folder / f"step={saved}.ckpt"
    module = ModuleWithTest() if start == "dense" else load_from_checkpoint(ModuleWithTest, folder / "step=18.ckpt")
    trainer = quiet_trainer(tmp_path, callbacks=[callback()])
    loader = text_loader(text_samples(seed=5))
    (tested,) = trainer.test(module, loader, ckpt_path=str(path), verbose=False)
    plain = load_from_checkpoint(ModuleWithTest, path)
    (expected,) = quiet_trainer(tmp_path).test(plain, loader, verbose=False)
    assert tested == expected


def test_weights_alone_load_too(whole, tmp_path) -> None:
    _, _, expected = whole
    saving = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True, save_last=True, save_top_k=0, every_n_epochs=1)
    trainer = quiet_trainer(tmp_path, callbacks=[callback(), saving], max_epochs=EPOCHS, enable_checkpointing=True)
    torch.manual_seed(0)
    trainer.fit(TextModule(), text_loader())
    module = load_from_checkpoint(TextModule, tmp_path / "last.ckpt")
    assert torch.equal(weights(module), weights(expected))


@pytest.mark.parametrize("wrong", [torch.nn.Linear, TextModule()])
def test_what_is_no_lightning_module_class_is_refused(whole, wrong) -> None:
    folder, *_ = whole
    with pytest.raises(ConfigurationError, match="takes the class of the LightningModule that was trained"):
        load_from_checkpoint(wrong, folder / "step=18.ckpt")


def test_a_checkpoint_saved_after_fit_loads(whole, tmp_path) -> None:
    _, trainer, expected = whole
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.equal(weights(load_from_checkpoint(TextModule, tmp_path / "after.ckpt")), weights(expected))


@pytest.mark.parametrize(
    ("build", "seen"),
    [
        (lambda: tiny_bert(layers=3), "2 layers instead of 3"),
        (lambda: tiny_bert(ffn=128), "64 instead of 128 for 'ffn' of layer 0"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(whole, tmp_path, build, seen) -> None:
    folder, *_ = whole
    with pytest.raises(ConfigurationError, match=seen):
        load_from_checkpoint(TextModule, folder / "step=12.ckpt", model=build())
    with pytest.raises(ConfigurationError, match=seen):
        quiet_trainer(tmp_path, callbacks=[callback()]).fit(
            TextModule(build()), text_loader(), ckpt_path=str(folder / "step=12.ckpt")
        )


def test_a_checkpoint_of_a_run_that_never_pruned_loads(tmp_path) -> None:
    module = TextModule()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, text_loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert torch.equal(weights(load_from_checkpoint(TextModule, tmp_path / "plain.ckpt")), weights(module))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    fit(Path(sys.argv[1]), kill_at=int(sys.argv[2]))
    raise SystemExit("was not killed")
