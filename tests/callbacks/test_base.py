from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as lightning_pl
import pytest
import pytorch_lightning as pl

from adaptrain import AdaptiveCallback, ConfigurationError, Decision
from adaptrain.callbacks.base import decision_log
from tests.toys import TextModule, quiet_trainer, text_loader


class Decider(AdaptiveCallback):
    """Decides once, and tampers with the trainer until it exits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heard: list[Decision] = []
        self.undone: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.record(trainer, "knob", old=1, new=2, reason="because", readings={"x": 1.0})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.on_exit(lambda: self.undone.append("first registered"))
        self.on_exit(lambda: self.undone.append("last registered"))

    def on_decision(self, trainer: Any, pl_module: Any, decision: Decision) -> None:
        self.heard.append(decision)


@pytest.mark.parametrize("namespace", [pl, lightning_pl], ids=["pytorch_lightning", "lightning"])
def test_a_decision_is_logged_and_heard_by_the_others(tmp_path, namespace):
    one, two = Decider(), Decider(name="two")
    module = TextModule()
    if namespace is lightning_pl:
        module = _in_other_namespace()
    trainer = quiet_trainer(tmp_path, namespace=namespace, callbacks=[one, two])
    trainer.fit(module, text_loader())
    assert [d.source for d in one.heard] == ["Decider"]
    assert len(two.heard) == 1
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [(line["step"], line["knob"], line["old"], line["new"]) for line in lines] == [(2, "knob", 1, 2)] * 2
    assert [d.to_json() for d in decision_log(trainer)] == [d.to_json() for d in two.heard + one.heard]


def _in_other_namespace() -> Any:
    class Other(lightning_pl.LightningModule):
        training_step = TextModule.training_step
        configure_optimizers = TextModule.configure_optimizers
        on_train_batch_end = TextModule.on_train_batch_end

    source = TextModule()
    other = Other()
    other.model, other.lr, other.optimizer_name, other.losses = source.model, 1e-2, "AdamW", []
    return other


def test_a_dry_run_is_recorded_but_not_offered(tmp_path):
    dry, listener = Decider(dry_run=True), Decider(name="listener")
    trainer = quiet_trainer(tmp_path, callbacks=[dry, listener])
    trainer.fit(TextModule(), text_loader())
    assert [d.applied for d in decision_log(trainer)] == [False, True]
    assert listener.heard == []


def test_what_was_changed_is_undone_last_first_after_success_and_failure(tmp_path):
    class Broken(TextModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("broken on purpose")

    fine = Decider()
    quiet_trainer(tmp_path, callbacks=[fine]).fit(TextModule(), text_loader())
    assert fine.undone == ["last registered", "first registered"]
    broken = Decider()
    with pytest.raises(RuntimeError, match="on purpose"):
        quiet_trainer(tmp_path, callbacks=[broken]).fit(Broken(), text_loader())
    assert broken.undone == ["last registered", "first registered"]


def test_one_failing_undo_does_not_keep_the_others_from_running():
    callback = Decider()
    callback.on_exit(lambda: callback.undone.append("still done"))

    def fail() -> None:
        raise RuntimeError("undo failed")

    callback.on_exit(fail)
    with pytest.raises(RuntimeError, match="undo failed"):
        callback.teardown(None, None, "fit")
    assert callback.undone == ["still done"]


def test_two_instances_need_two_names(tmp_path):
    assert Decider(name="a").state_key != Decider(name="b").state_key
    assert Decider().state_key == "Decider"


def test_refusals_name_the_module_and_the_fix(tmp_path):
    class Manual(TextModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class Needs(AdaptiveCallback):
        def check(self, trainer: Any, pl_module: Any) -> None:
            from adaptrain import _lightning

            _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)

    with pytest.raises(ConfigurationError, match="Manual sets automatic_optimization=False"):
        quiet_trainer(tmp_path, callbacks=[Needs()]).fit(Manual(), text_loader())
