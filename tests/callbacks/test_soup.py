from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from adaptrain import (
    ConfigurationError,
    FamilyCheckpoint,
    OneShotSchedule,
    ProgressivePruning,
    Quantization,
    WeightSoup,
)
from adaptrain.callbacks.base import decision_log
from adaptrain.compression import load_quantized
from tests.toys import TextModule, quiet_trainer, text_loader, weights

EPOCHS = 4


class Judged(TextModule):
    """Its accuracy is given: by the epoch it is trained in, and afterwards by how near its weights are to `best`."""

    def __init__(self, accuracies: Any, best: Any = None) -> None:
        super().__init__()
        self.accuracies = list(accuracies)
        self.best = best
        self.epochs: list[Any] = []

    def on_validation_epoch_end(self) -> None:
        self.log("val/accuracy", self._accuracy())

    def _accuracy(self) -> float:
        if self.trainer.state.fn == "fit":
            self.epochs.append(weights(self).clone())
            return self.accuracies[len(self.epochs) - 1]
        best = self.best(self.epochs) if self.best is not None else self.epochs[-1]
        return 1.0 - float((weights(self) - best).abs().max())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def run(tmp_path, soup: WeightSoup | None, module: Any, *others: Any, **settings: Any) -> Any:
    callbacks = [callback for callback in (*others, soup) if callback is not None]
    trainer = quiet_trainer(
        tmp_path, callbacks=callbacks, **({"max_epochs": EPOCHS, "num_sanity_val_steps": 0} | settings)
    )
    trainer.fit(module, text_loader(), text_loader())
    return trainer


def soups(trainer: Any) -> list[Any]:
    return [decision for decision in decision_log(trainer) if decision.knob == "weights"]


class Diverged(Judged):
    """The last weights have no accuracy, in training or afterwards."""

    def _accuracy(self) -> float:
        accuracy = super()._accuracy()
        return math.nan if len(self.epochs) == EPOCHS and torch.equal(weights(self), self.epochs[-1]) else accuracy


@pytest.mark.parametrize(
    ("method", "best"),
    [("uniform_soup", lambda epochs: sum(epochs[:3]) / 3), ("greedy_soup", lambda epochs: epochs[1])],
)
def test_a_run_that_diverged_at_its_end_goes_back_to_what_was_kept(tmp_path, method: Any, best: Any) -> None:
    module = Diverged([0.5, 0.6, 0.7, 0.8], best)
    trainer = run(tmp_path, WeightSoup(method=method, keep=4, begin=0.0), module)
    torch.testing.assert_close(weights(module), best(module.epochs))
    [decision] = soups(trainer)
    assert math.isnan(decision.old)
    assert decision.new == pytest.approx(1.0)


def test_the_average_takes_the_place_of_the_last_weights_where_it_is_better(tmp_path) -> None:
    module = Judged([0.1, 0.5, 0.7, 0.6], best=lambda epochs: (epochs[2] + epochs[3]) / 2)
    trainer = run(tmp_path, WeightSoup(keep=2, begin=0.0, method="uniform_soup"), module)
    torch.testing.assert_close(weights(module), (module.epochs[2] + module.epochs[3]) / 2)
    (decision,) = soups(trainer)
    assert decision.new == pytest.approx(1.0)
    assert decision.old < decision.new
    assert "val/accuracy" in decision.reason
    saved = torch.load(tmp_path / "soup" / "soup.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in module.state_dict().items())


def test_the_last_weights_stay_where_they_are_better(tmp_path) -> None:
    module = Judged([0.1, 0.5, 0.7, 0.6])  # afterwards nothing is better than what training ended with
    trainer = run(tmp_path, WeightSoup(keep=3, begin=0.0, method="uniform_soup"), module)
    assert torch.equal(weights(module), module.epochs[-1])
    (decision,) = soups(trainer)
    assert decision.new == decision.old
    assert not (tmp_path / "soup" / "soup.ckpt").exists()


def test_a_greedy_soup_leaves_out_what_makes_it_worse(tmp_path) -> None:
    module = Judged([0.5, 0.6, 0.7, 0.8], best=lambda epochs: (epochs[1] + epochs[3]) / 2)
    run(tmp_path, WeightSoup(keep=4, begin=0.0), module)
    found, wanted = weights(module), (module.epochs[1] + module.epochs[3]) / 2
    everything = torch.stack(module.epochs).mean(0)
    assert (found - wanted).abs().max() < (everything - wanted).abs().max()
    assert (found - wanted).abs().max() < (module.epochs[3] - wanted).abs().max()


def test_the_best_are_kept_and_no_more(tmp_path) -> None:
    module = Judged([0.9, 0.2, 0.8, 0.1])
    trainer = run(tmp_path, WeightSoup(keep=2, begin=0.0), module)
    steps = trainer.global_step // EPOCHS
    assert {path.name for path in (tmp_path / "soup").glob("step=*")} == {
        f"step={steps}.ckpt",
        f"step={3 * steps}.ckpt",
    }


def test_nothing_is_kept_before_begin(tmp_path) -> None:
    module = Judged([0.9, 0.8, 0.2, 0.1])
    trainer = run(tmp_path, WeightSoup(begin=0.7), module)
    steps = trainer.global_step // EPOCHS
    kept = {path.name for path in (tmp_path / "soup").glob("step=*")}
    assert kept == {f"step={3 * steps}.ckpt", f"step={4 * steps}.ckpt"}


def test_weights_of_another_structure_are_dropped(tmp_path) -> None:
    module = Judged([0.9, 0.8, 0.2, 0.1])
    module._accuracy = lambda: 0.5  # type: ignore[method-assign]
    pruning = ProgressivePruning(target={"flops": 0.6}, schedule=OneShotSchedule(at=0.6))
    trainer = run(tmp_path, WeightSoup(begin=0.0, method="uniform_soup"), module, pruning)
    steps = trainer.global_step // EPOCHS
    kept = {path.name for path in (tmp_path / "soup").glob("step=*")}
    assert kept == {f"step={3 * steps}.ckpt", f"step={4 * steps}.ckpt"}
    assert len(soups(trainer)) == 1


@pytest.mark.parametrize("first", [True, False])
def test_what_works_on_the_final_weights_works_on_the_average(tmp_path, first: bool) -> None:
    module = Judged([0.1, 0.5, 0.7, 0.6], best=lambda epochs: (epochs[2] + epochs[3]) / 2)
    soup = WeightSoup(keep=2, begin=0.0, method="uniform_soup")
    others = [Quantization(method="bf16", max_metric_drop=1.0), FamilyCheckpoint(latency_input=(2, 8))]
    order = [soup, *others] if first else [*others, soup]
    trainer = quiet_trainer(tmp_path, callbacks=order, max_epochs=EPOCHS, num_sanity_val_steps=0)
    trainer.fit(module, text_loader(), text_loader())
    average = ((module.epochs[2] + module.epochs[3]) / 2).to(torch.bfloat16)
    small = load_quantized(tmp_path / "quantized")
    assert torch.equal(torch.cat([p.flatten() for p in small.parameters()]), average)
    assert [type(callback) for callback in trainer.callbacks[: len(order)]] == [type(callback) for callback in order]


def test_a_dry_run_says_what_it_would_do(tmp_path) -> None:
    module = Judged([0.1, 0.5, 0.7, 0.6], best=lambda epochs: (epochs[2] + epochs[3]) / 2)
    trainer = run(tmp_path, WeightSoup(keep=2, begin=0.0, method="uniform_soup", dry_run=True), module)
    assert torch.equal(weights(module), module.epochs[-1])
    (decision,) = soups(trainer)
    assert not decision.applied
    assert decision.new > decision.old


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # it is what we resume from
def test_a_resumed_run_goes_on_with_what_its_checkpoint_knows(tmp_path) -> None:
    accuracies = [0.9, 0.3, 0.8, 0.7]
    whole = Judged(accuracies)
    run(tmp_path / "whole", WeightSoup(keep=2, begin=0.0), whole)
    first = Judged(accuracies)
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    run(tmp_path / "cut", WeightSoup(keep=2, begin=0.0), first, checkpoint, max_epochs=2, enable_checkpointing=True)
    (tmp_path / "cut" / "soup" / "step=999.ckpt").write_bytes(b"of a run that went further")
    second = Judged(accuracies[2:])
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    trainer = quiet_trainer(
        tmp_path / "cut",
        callbacks=[WeightSoup(keep=2, begin=0.0), checkpoint],
        max_epochs=EPOCHS,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
    )
    trainer.fit(second, text_loader(), text_loader(), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    names = [{path.name for path in (tmp_path / run / "soup").glob("step=*")} for run in ("whole", "cut")]
    assert names[0] == names[1]


def test_a_metric_that_is_not_logged_is_named(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"val/f1.*val/accuracy"):
        run(tmp_path, WeightSoup(monitor="val/f1", begin=0.0), Judged([0.1] * EPOCHS))
