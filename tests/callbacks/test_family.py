"""Members are kept while the model trains. Also the script of the run that is killed."""

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

from adaptrain import ConfigurationError, Distillation, FamilyCheckpoint, ModelFamily
from adaptrain.callbacks import family_recovery
from adaptrain.callbacks.base import decision_log
from adaptrain.family.store import FamilyStore
from tests.contract.runs import loader
from tests.family.conftest import RankedModule, fit_family, pruning
from tests.processes import run_python
from tests.toys import (
    TextModule,
    language_model_samples,
    quiet_trainer,
    text_loader,
    text_samples,
    tiny_bert,
    tiny_llama,
    weights,
)

pytestmark = [
    # Tests read and write checkpoints across runs and folders on purpose.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty.*"),
]


class KillAt(pl.Callback):
    """SIGKILL, with no chance to clean up, after `step` optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class StopAt(KillAt):
    """Ends training early."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def fit_saving(folder: Path, *extra: Any, **settings: Any) -> Any:
    checkpoint = ModelCheckpoint(dirpath=folder, save_top_k=0, save_last=True, every_n_train_steps=6)
    callbacks = [FamilyCheckpoint(), pruning(), checkpoint, *extra]
    return fit_family(folder, callbacks, enable_checkpointing=True, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("run")
    _, module = fit_family(folder, [FamilyCheckpoint(), pruning()])
    return folder, module


def test_training_ends_as_without_it(run, tmp_path):
    _, plain = fit_family(tmp_path, [pruning()])
    assert torch.equal(weights(run[1]), weights(plain))


def test_killed_and_resumed_leaves_the_same_family(run, tmp_path):
    # Killed after the second member was taken, at step 17; the checkpoint of step 12 knows of the first.
    done = run_python("-m", __name__, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [member.name for member in ModelFamily.load(tmp_path)] == ["dense", "pruned-1"]
    fit_saving(tmp_path, ckpt_path=str(tmp_path / "last.ckpt"))
    resumed, whole = ModelFamily.load(tmp_path), ModelFamily.load(run[0])
    assert [(each.name, each.step) for each in resumed] == [(each.name, each.step) for each in whole]
    for ours, theirs in zip(resumed, whole, strict=True):
        assert torch.equal(weights(ours.model()), weights(theirs.model()))
        assert ours.metrics == theirs.metrics


def test_a_resumed_run_whose_members_are_gone_is_refused(tmp_path):
    fit_saving(tmp_path, max_epochs=2)
    (tmp_path / "family" / "dense.json").unlink()
    with pytest.raises(ConfigurationError, match="members dense of its family"):
        fit_saving(tmp_path, ckpt_path=str(tmp_path / "last.ckpt"))


def test_what_training_ended_too_early_for_is_kept_as_well(tmp_path):
    early = pruning(schedule={"begin": 0.9, "end": 0.95, "events": 1})
    trainer, _ = fit_family(tmp_path, [FamilyCheckpoint(), Distillation(), early, StopAt(9)])
    names = [member.name for member in ModelFamily.load(tmp_path)]
    assert names == ["dense", "final"]
    knobs = [decision.knob for decision in decision_log(trainer)]
    assert "distillation" not in knobs  # no step was left for the teacher


def test_without_structural_events_there_is_the_final_one(tmp_path):
    trainer, module = fit_family(tmp_path, [FamilyCheckpoint(latency_input={"one": (1, 8)}, monitor="val/loss")])
    family = ModelFamily.load(tmp_path)
    assert [member.name for member in family] == ["final"]
    assert (family.metric, family.mode, family.shapes) == ("val/loss", "min", {"one": (1, 8)})
    assert family["final"].metric == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    (decision,) = decision_log(trainer)
    assert (decision.knob, decision.new) == ("family", 1)
    assert decision.readings["params"] == family["final"].params == len(weights(module))


def test_a_dry_run_leaves_no_folder(tmp_path):
    trainer, _ = fit_family(tmp_path, [FamilyCheckpoint(dry_run=True), pruning()])
    assert not (tmp_path / "family").exists()
    kept = [decision for decision in decision_log(trainer) if decision.knob == "family"]
    assert [decision.new for decision in kept] == [1, 2, 3]
    assert not any(decision.applied for decision in kept)


def test_a_metric_that_is_not_logged_is_told(tmp_path, caplog):
    fit_family(tmp_path, [FamilyCheckpoint(monitor="val/f1")])
    assert "monitor=val/f1 is not logged by validation; there are: val/accuracy, val/loss" in caplog.text
    assert ModelFamily.load(tmp_path).select().name == "final"


def test_a_module_without_validation_is_not_ranked(tmp_path, caplog):
    trainer = quiet_trainer(tmp_path, callbacks=[FamilyCheckpoint(), pruning()], max_epochs=4)
    trainer.fit(TextModule(), text_loader())
    assert "logs no validation metric" in caplog.text
    family = ModelFamily.load(tmp_path)
    assert family.select().name == "dense"  # the largest, for want of better knowledge
    assert family.metric is None


def test_members_that_diverged_are_the_last_to_be_chosen(tmp_path, caplog):
    class Diverges(TextModule):
        def validation_step(self, batch, batch_idx):
            self.log("val/accuracy", float("nan") if len(weights(self)) < dense else 0.5)

    module = Diverges()
    dense = len(weights(module))
    fit_family(tmp_path, [FamilyCheckpoint(), pruning()], module=module)
    family = ModelFamily.load(tmp_path)
    assert family.metric == "val/accuracy"
    assert [member.metric for member in family] == [0.5, *[None] * (len(family) - 1)]
    assert family.select().name == "dense"
    assert "Member 'final' has diverged: its val/accuracy is no number." in caplog.text
    with pytest.raises(ConfigurationError, match=r"the best val/accuracy is 0.5 \(member dense\)"):
        family.select(metric_at_least=0.6)


def test_trainer_and_module_are_left_as_they_were(tmp_path):
    callbacks = [FamilyCheckpoint(), pruning()]
    trainer, module = fit_family(tmp_path, callbacks)
    assert trainer.callbacks[:2] == callbacks
    assert module.trainer is trainer
    assert "configure_callbacks" not in vars(module)
    trainer.save_checkpoint(tmp_path / "after.ckpt")  # optimizer state and weights fit together
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert len(weights(module)) == ModelFamily.load(tmp_path)["final"].params
    assert sum(value.numel() for value in saved["state_dict"].values()) >= len(weights(module))


def test_language_models_have_families_too(tmp_path):
    class Module(TextModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/perplexity", self.model(**batch).loss.exp())

    loader = text_loader(language_model_samples())
    trainer = quiet_trainer(tmp_path, callbacks=[FamilyCheckpoint(), pruning()], max_epochs=4)
    torch.manual_seed(0)
    trainer.fit(Module(tiny_llama()), loader, text_loader(language_model_samples(16, seed=2)))
    family = ModelFamily.load(tmp_path)
    assert (family.task, family.metric, family.mode) == ("language_model", "val/perplexity", "min")
    assert family.select() is min(family, key=lambda member: member.metric)


def test_shapes_the_model_cannot_read_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="reads at most 64 tokens, but 65"):
        fit_family(tmp_path, [FamilyCheckpoint(latency_input=(1, 65))])
    assert not (tmp_path / "family").exists()


class Fewer(RankedModule):
    """Its accuracy is the lower the larger the model: what was trained least is the worst."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", 1e4 / len(weights(self)) - float(self.model(**batch).loss) / 1e3)


def test_members_are_taught_by_the_best_and_keep_what_is_better(run, tmp_path):
    trainer, module = fit_family(tmp_path, [FamilyCheckpoint(recovery_steps=12), pruning()], module=Fewer())
    before, after = ModelFamily.load(run[0]), ModelFamily.load(tmp_path)
    assert torch.equal(weights(module), weights(run[1]))  # the trained module is as it would be without
    assert module.trainer is trainer
    assert not any(parameter.grad is not None for parameter in module.parameters())
    assert torch.equal(weights(after["final"].model()), weights(before["final"].model()))  # the best is the teacher
    recovered = [decision for decision in decision_log(trainer) if decision.knob == "recovery"]
    assert len(recovered) == 2
    for decision, name in zip(recovered, ("dense", "pruned-1"), strict=True):
        assert f"12 more steps of member '{name}', taught by 'final', were" in decision.reason
        kept = "were kept" in decision.reason
        changed = not torch.equal(weights(after[name].model()), weights(before[name].model()))
        assert changed == kept == (decision.new > decision.old)
        assert after[name].metric == pytest.approx(decision.new)
        assert after[name].widths == before[name].widths
    assert any("were kept" in decision.reason for decision in recovered)


def test_members_may_learn_without_a_teacher(run, tmp_path):
    callback = FamilyCheckpoint(recovery_steps=12, recovery_teacher=None)
    trainer, module = fit_family(tmp_path, [callback, pruning()], module=Fewer())
    assert torch.equal(weights(module), weights(run[1]))
    before, after = ModelFamily.load(run[0]), ModelFamily.load(tmp_path)
    first = next(decision for decision in decision_log(trainer) if decision.knob == "recovery")
    assert first.reason.startswith("12 more steps of member 'dense' were kept")
    assert after["dense"].metric == pytest.approx(first.new)
    assert not torch.equal(weights(after["dense"].model()), weights(before["dense"].model()))


def test_a_member_that_comes_to_as_much_as_the_best_does_not_replace_it(tmp_path):
    dense = len(weights(RankedModule()))

    class Level(RankedModule):
        """The dense member is worse than the others until it has trained again."""

        again = False

        def on_fit_start(self) -> None:
            self.again = self.trainer.max_steps == 4

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/accuracy", float(self.again or len(weights(self)) < dense))

    fit_family(tmp_path, [FamilyCheckpoint(recovery_steps=4), pruning()], module=Level())
    notes = {member["name"]: member.get("recovery") for member in FamilyStore(tmp_path / "family").members()}
    assert notes["pruned-1"] is None
    assert (notes["dense"]["teacher"], notes["dense"]["kept"]) == ("pruned-1", True)
    assert (notes["final"]["teacher"], notes["final"]["kept"]) == ("pruned-1", False)


def test_recovery_does_not_move_the_place_in_the_data(tmp_path):
    places = []

    class Remember(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            places.append(trainer.train_dataloader.state_dict())

    trainer = quiet_trainer(tmp_path, callbacks=[FamilyCheckpoint(recovery_steps=4), pruning(), Remember()],
                            max_epochs=4)  # fmt: skip
    trainer.fit(Fewer(), loader(trainer), text_loader(text_samples(16)))
    assert "recovery" in {decision.knob for decision in decision_log(trainer)}
    assert trainer.train_dataloader.state_dict() == places[0]


def test_a_recovery_that_was_killed_goes_on_with_the_next_member(tmp_path, monkeypatch):
    trained: list[str] = []
    train = family_recovery._train

    def interrupted(trainer: Any, pl_module: Any, teacher: Any, steps: int, folder: Path) -> None:
        if trained:
            raise KeyboardInterrupt
        trained.append(folder.name)
        train(trainer, pl_module, teacher, steps, folder)

    def go_on(trainer: Any, pl_module: Any, teacher: Any, steps: int, folder: Path) -> None:
        trained.append(folder.name)
        train(trainer, pl_module, teacher, steps, folder)

    def run(**settings: Any) -> None:
        saving = ModelCheckpoint(dirpath=tmp_path, save_top_k=0, save_last=True, every_n_train_steps=18)
        callbacks = [FamilyCheckpoint(recovery_steps=4), pruning(), saving]
        fit_family(tmp_path, callbacks, module=Fewer(), enable_checkpointing=True, **settings)

    monkeypatch.setattr(family_recovery, "_train", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run()
    assert trained == ["dense"]
    assert [member.name for member in ModelFamily.load(tmp_path)] == ["dense", "pruned-1", "final"]
    monkeypatch.setattr(family_recovery, "_train", go_on)
    run(ckpt_path=str(tmp_path / "last.ckpt"))
    assert trained == ["dense", "pruned-1"]


def test_a_run_resumed_at_its_very_end_still_measures_its_family(run, tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=0, save_last=True, every_n_train_steps=24)
    callbacks = [FamilyCheckpoint(), pruning(), checkpoint]
    fit_family(tmp_path, callbacks, enable_checkpointing=True)
    (tmp_path / "family" / "final.json").unlink()  # as if killed before it was written
    fit_family(tmp_path, callbacks, enable_checkpointing=True, ckpt_path=str(tmp_path / "last.ckpt"))
    resumed, whole = ModelFamily.load(tmp_path), ModelFamily.load(run[0])
    assert [(each.name, each.step, each.metrics) for each in resumed] == [
        (each.name, each.step, each.metrics) for each in whole
    ]


def test_what_cannot_be_taught_is_refused_before_training(tmp_path):
    model = tiny_bert()
    model.config.problem_type = "regression"
    with pytest.raises(ConfigurationError, match="trained for regression"):
        fit_family(tmp_path, [FamilyCheckpoint(recovery_steps=4)], module=RankedModule(model))
    family_recovery.check_recovery(quiet_trainer(tmp_path), RankedModule(model), taught=False)


def test_a_recovery_that_fails_costs_nothing_but_itself(run, tmp_path, caplog):
    class Failing(Fewer):
        def on_fit_start(self) -> None:
            if self.trainer.max_steps == 7:
                raise RuntimeError("not twice")

    _, module = fit_family(tmp_path, [FamilyCheckpoint(recovery_steps=7), pruning()], module=Failing())
    assert "The member 'dense' could not be recovered: RuntimeError: not twice" in caplog.text
    assert torch.equal(weights(module), weights(run[1]))
    assert len(ModelFamily.load(tmp_path)) == 3


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    where = Path(sys.argv[1])
    fit_saving(where, KillAt(17))
    raise SystemExit("was not killed")
