from __future__ import annotations

import pickle
import time

import lightning.pytorch
import pytest
import torch

from adaptrain import ConfigurationError, WallClock, _lightning
from adaptrain.callbacks.base import decision_log
from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, weights


class Slow(TextModule):
    """Takes at least 20 ms per batch, and notes what progress was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        self.seen.append(_lightning.progress(self.trainer))
        return super().training_step(batch, batch_idx)


def test_training_ends_when_the_time_is_spent(tmp_path):
    clock = WallClock(minutes=0.5 / 60)
    trainer = quiet_trainer(tmp_path, max_epochs=100, callbacks=[clock])
    module = Slow()
    trainer.fit(module, text_loader(text_samples(64)))
    assert 1 <= trainer.global_step <= 25
    (decision,) = decision_log(trainer)
    assert decision.knob == "wall_clock"
    assert decision.new == trainer.global_step
    assert decision.old == 800
    assert decision.readings["elapsed_s"] + decision.readings["step_s"] > 0.5
    assert f"after {trainer.global_step} of 800 steps" in decision.reason
    assert module.seen == sorted(module.seen)
    assert module.seen[0] == 0.0
    assert trainer.global_step < 3 or module.seen[-1] > 0.04  # by its time, not by its 25 of 800 steps


def test_it_serves_the_other_namespace(tmp_path):
    class Other(lightning.pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = quiet_trainer(tmp_path, namespace=lightning.pytorch, callbacks=[WallClock(minutes=1e-6)])
    trainer.fit(Other(), torch.utils.data.DataLoader(torch.randn(64, 2), batch_size=4))
    assert trainer.global_step == 1


def test_without_a_limit_progress_is_the_share_of_steps(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[WallClock()], accumulate_grad_batches=2)
    module = Slow()
    trainer.fit(module, text_loader(text_samples(32)))
    assert module.seen == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert len(decision_log(trainer)) == 0


def test_a_dry_run_records_and_leaves_everything_alone(tmp_path):
    plain, dry = Slow(), Slow()
    quiet_trainer(tmp_path / "plain").fit(plain, text_loader())
    trainer = quiet_trainer(tmp_path / "dry", callbacks=[WallClock(minutes=1e-6, dry_run=True)])
    trainer.fit(dry, text_loader())
    assert trainer.global_step == 6
    assert dry.seen == plain.seen
    assert torch.equal(weights(plain), weights(dry))
    (decision,) = decision_log(trainer)
    assert not decision.applied


def test_a_resumed_run_goes_on_counting(tmp_path):
    clock = WallClock(minutes=100)
    trainer = quiet_trainer(tmp_path / "a", callbacks=[clock], max_epochs=1)
    trainer.fit(Slow(), text_loader())
    spent = clock.state_dict()["elapsed_s"]
    assert spent >= 0.12
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = WallClock(minutes=100)
    trainer = quiet_trainer(tmp_path / "b", callbacks=[resumed], max_epochs=2)
    trainer.fit(Slow(), text_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.state_dict()["elapsed_s"] >= spent + 0.12


def test_a_resumed_run_whose_time_is_spent_takes_one_step(tmp_path):
    clock = WallClock(minutes=1)
    trainer = quiet_trainer(tmp_path / "a", callbacks=[clock])
    trainer.fit(Slow(), text_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer = quiet_trainer(tmp_path / "b", callbacks=[WallClock(minutes=0.001)], max_epochs=9)
    trainer.fit(Slow(), text_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 7


def test_a_second_fit_starts_anew(tmp_path):
    clock = pickle.loads(pickle.dumps(WallClock(minutes=60)))
    for _ in range(2):
        trainer = quiet_trainer(tmp_path, callbacks=[clock])
        module = Slow()
        trainer.fit(module, text_loader())
        assert module.seen[0] == 0.0
    assert clock.state_dict()["elapsed_s"] < 60


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), "10", True])
def test_refuses_minutes_that_are_none(minutes):
    with pytest.raises(ConfigurationError, match="minutes must be a number greater than 0"):
        WallClock(minutes=minutes)
