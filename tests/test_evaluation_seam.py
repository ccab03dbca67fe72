"""The private seams of evaluation and of the transfer: these fail first when Lightning moves them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch

from adaptrain import _lightning
from adaptrain._lightning.evaluation import EvaluationStep, wrap_evaluation, wrap_transfer
from tests.toys import TextModule, quiet_trainer, text_loader

NAMESPACES = [pytorch_lightning, lightning.pytorch]


def evaluated(namespace):
    """A module of either namespace with all three steps; what they share is that they return the rows."""

    class Evaluated(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("rows", float(len(batch["labels"])))
            return len(batch["labels"])

        def test_step(self, batch, batch_idx):
            self.log("rows", float(len(batch["labels"])))
            return len(batch["labels"])

        def predict_step(self, batch):  # without batch_idx, which Lightning then leaves out
            return len(batch["labels"])

    return Evaluated()


def unsplit(step: EvaluationStep):
    return step.forward(step.batch)


class Wrapping(_lightning.Callback):
    def __init__(self, run) -> None:
        self.run = run

    def setup(self, trainer, pl_module, stage) -> None:
        self.undo = wrap_evaluation(trainer, pl_module, self.run)

    def teardown(self, trainer, pl_module, stage) -> None:
        self.undo()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_each_stage_of_lightning_runs_through_the_seam(namespace, tmp_path: Path) -> None:
    seen: list[tuple] = []

    def run(step: EvaluationStep):
        logged = step.logged()
        with logged.capture():
            output = step.forward(step.batch)
        logged.flush()
        seen.append((step.stage, step.loader, output))
        return output

    module = evaluated(namespace)
    trainer = quiet_trainer(tmp_path, namespace=namespace, callbacks=[Wrapping(run)])
    loader = text_loader(batch_size=24)
    validated = trainer.validate(module, [loader, loader], verbose=False)
    [tested] = trainer.test(module, loader, verbose=False)
    assert trainer.predict(module, loader) == [24, 24]
    assert [result[f"rows/dataloader_idx_{i}"] for i, result in enumerate(validated)] == [24.0, 24.0]
    assert tested == {"rows": 24.0}
    expected = [("validation", 0, 24)] * 2 + [("validation", 1, 24)] * 2 + [("test", None, 24)] * 2
    assert seen == expected + [("predict", None, 24)] * 2
    assert not {"validation_step", "test_step", "predict_step"} & set(vars(module))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_lightning_still_sees_what_the_user_has_defined(namespace, tmp_path: Path) -> None:
    """It asks the module whether a step is overridden, and for its signature, through the wrapper."""
    module = type("Bare", (namespace.LightningModule,), {"training_step": TextModule.training_step})()
    trainer = quiet_trainer(tmp_path, namespace=namespace)
    overridden = __import__(f"{namespace.__name__}.utilities.model_helpers", fromlist=["is_overridden"]).is_overridden
    wrap_evaluation(trainer, module, unsplit)
    assert not overridden("validation_step", module)
    module = evaluated(namespace)
    wrap_evaluation(trainer, module, unsplit)
    assert overridden("validation_step", module)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_stages_and_the_results_are_where_the_seam_looks(namespace, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, namespace=namespace)
    for name in ("validating", "sanity_checking", "testing", "predicting"):
        assert getattr(trainer, name) is False
    assert trainer.predict_loop._results is None
    assert hasattr(trainer.validate_loop._results, "log")
    assert hasattr(trainer.fit_loop.epoch_loop.val_loop._results, "log")


def test_calls_that_are_not_the_trainers_pass_through(tmp_path: Path) -> None:
    def run(step: EvaluationStep):
        raise AssertionError

    module = evaluated(pytorch_lightning)
    undo = wrap_evaluation(quiet_trainer(tmp_path), module, run)
    assert module.predict_step({"labels": [1, 2]}) == 2
    undo()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_batch_is_transferred_through_the_seam(namespace, tmp_path: Path) -> None:
    counts = {"fit": 0, "validate": 0, "predict": 0}
    module = evaluated(namespace)
    module.training_step = lambda batch, batch_idx: module.layer(torch.ones(1, 1)).sum()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    loader = text_loader(batch_size=24)
    for stage in counts:
        trainer = quiet_trainer(tmp_path, namespace=namespace, limit_val_batches=2 if stage == "validate" else 0)

        def run(transfer, stage=stage):
            counts[stage] += 1
            return transfer()

        undo = wrap_transfer(trainer, run)
        arguments = {"fit": {"val_dataloaders": loader}, "validate": {"verbose": False}}.get(stage, {})
        getattr(trainer, stage)(module, loader, **arguments)
        undo()
        assert "batch_to_device" not in vars(trainer.strategy)
    assert counts == {"fit": 2, "validate": 2, "predict": 2}


class Copied(pytorch_lightning.LightningModule):
    rows = 0

    def test_step(self, batch, batch_idx):
        self.rows += len(batch["labels"])


def test_a_copy_of_the_module_has_its_own_steps(tmp_path: Path) -> None:
    copies = []

    def run(step: EvaluationStep):
        attached, module._trainer = module._trainer, None  # a copy of the module need not bring the trainer
        copies.extend([copy.deepcopy(module), pickle.loads(pickle.dumps(module))])
        module._trainer = attached
        return step.forward(step.batch)

    module = Copied()
    trainer = quiet_trainer(tmp_path, callbacks=[Wrapping(run)], limit_test_batches=1)
    trainer.test(module, text_loader(batch_size=24), verbose=False)
    for copied in copies:
        assert copied.rows == 0
        copied.test_step({"labels": [1, 2]}, 0)
        assert copied.rows == 2
    assert module.rows == 24


def test_a_step_set_on_the_module_itself_is_served(tmp_path: Path) -> None:
    module = evaluated(pytorch_lightning)
    own = module.predict_step = lambda batch, batch_idx: batch_idx
    trainer = quiet_trainer(tmp_path, callbacks=[Wrapping(lambda step: 10 + unsplit(step))])
    assert trainer.predict(module, text_loader(batch_size=24)) == [10, 11]
    assert module.predict_step is own


def test_undo_leaves_a_wrapper_put_on_later_alone(tmp_path: Path) -> None:
    trainer, module = quiet_trainer(tmp_path), evaluated(pytorch_lightning)
    first = wrap_evaluation(trainer, module, unsplit)
    inner = module.test_step
    second = wrap_evaluation(trainer, module, unsplit)
    second()
    assert module.test_step is inner
    first()
    assert "test_step" not in vars(module)
