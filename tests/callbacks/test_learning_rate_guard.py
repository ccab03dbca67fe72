"""What the guard makes of bad batches, bad rates and bad weights."""

from __future__ import annotations

import math
import os
import re
import warnings

import pytest
import pytorch_lightning
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from adaptrain import LearningRateController
from adaptrain.callbacks.base import decision_log
from adaptrain.execution.host_snapshot import HostSnapshot
from tests.processes import FORKSERVER, free_port
from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, tiny_bert, weights


class Faulty(TextModule):
    """Multiplies the loss of chosen batches."""

    def __init__(self, faults=None, **kwargs) -> None:
        super().__init__(tiny_bert(layers=1), **kwargs)
        self.faults = faults or {}
        self.batches = 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * self.faults.get(self.batches, 1.0)
        self.batches += 1
        return loss


def guard_only(**kwargs):
    return LearningRateController(align=False, cap=False, plateau=False, **kwargs)


def train(root, module, *callbacks, epochs=1, samples=48, **kwargs):
    trainer = quiet_trainer(root, callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, text_loader(text_samples(samples), batch_size=4))
    return trainer


def reasons(trainer):
    return [decision.reason for decision in decision_log(trainer)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_never_reaches_the_weights(tmp_path, value, accumulate):
    class Watched(Faulty):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            assert torch.isfinite(weights(self)).all()
            for state in self.optimizers().state.values():
                assert all(torch.isfinite(tensor).all() for tensor in state.values())

    module = Watched({4: value})
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    trainer = train(tmp_path, module, guard_only(), **settings)
    assert trainer.global_step == 12 // accumulate
    (decision,) = decision_log(trainer)
    assert decision.step == 4 // accumulate
    assert (decision.old, decision.new) == (1.0, 0.0)
    assert decision.reason == "guard: the loss or a gradient is not finite; the step is skipped"


def test_a_skipped_step_leaves_everything_as_if_its_batch_had_not_been(tmp_path):
    class Without(Faulty):
        def training_step(self, batch, batch_idx):
            return None if self.global_step == 5 else super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    faulty = Faulty()
    faulty.faults = {5: math.nan}
    train(tmp_path / "faulty", faulty, guard_only())
    without = Without()
    with pytest.warns(UserWarning, match="returned `None`"):
        train(tmp_path / "without", without)
    assert torch.equal(weights(faulty), weights(without))


def test_gradients_that_are_not_finite_under_a_finite_loss_are_skipped(tmp_path):
    class BadGradient(Faulty):
        def on_after_backward(self):
            if self.global_step == 3:
                next(self.parameters()).grad[0, 0] = math.nan

    module = BadGradient()
    trainer = train(tmp_path, module, guard_only())
    assert torch.isfinite(weights(module)).all()
    assert len(reasons(trainer)) == 1


def test_a_spike_is_skipped(tmp_path):
    module = Faulty({60: 50.0}, lr=1e-4)
    trainer = train(tmp_path, module, guard_only(), epochs=6)
    assert reasons(trainer) == ["guard: the loss is a spike; the step is skipped"]
    assert next(iter(decision_log(trainer))).step == 60


def test_batch_norm_statistics_survive_a_batch_that_is_not_finite(tmp_path):
    class Normed(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    module = Normed()
    data = torch.randn(32, 4)
    data[17] = math.nan
    trainer = quiet_trainer(tmp_path, callbacks=[guard_only()])
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert all(torch.isfinite(buffer).all() for buffer in module.buffers())
    assert torch.isfinite(weights(module)).all()
    assert len(reasons(trainer)) == 1


def test_weights_that_went_bad_are_rolled_back_and_training_goes_on(tmp_path):
    class Struck(Faulty):
        """Cosmic rays: the weights are scrambled once."""

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            if self.global_step == 150:
                with torch.no_grad():
                    for parameter in self.parameters():
                        parameter.add_(torch.randn_like(parameter) * 5)

    module = Struck(lr=1e-3)
    trainer = train(tmp_path, module, guard_only(), epochs=15)
    assert "guard: training diverged; back to the last good weights (rollback 1 of 3)" in reasons(trainer)
    assert max(module.losses[150:155]) > 2 * module.losses[0]
    assert max(module.losses[-10:]) < 0.5 * module.losses[0]


@pytest.mark.parametrize("lr", [10.0, 1e4, 1e30])
def test_a_rate_far_too_high_is_survived_or_explained(tmp_path, lr):
    class Sgd(Faulty):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=lr)

    module = Sgd()
    explained = None
    try:
        train(tmp_path, module, LearningRateController(), epochs=4)
    except RuntimeError as error:
        explained = str(error)
    assert torch.isfinite(weights(module)).all()
    assert explained is None or re.search(r"Training diverged at step \d+, after 3 rollbacks", explained)


def test_data_that_is_never_finite_again_ends_with_an_explanation(tmp_path):
    module = Faulty(dict.fromkeys(range(5, 1000), math.nan))
    with pytest.raises(RuntimeError, match=r"diverged at step 24, after 3 rollbacks: loss nan, gradients not finite"):
        train(tmp_path, module, guard_only(), epochs=10)
    assert torch.isfinite(weights(module)).all()


def test_a_dry_run_of_a_diverging_run_goes_on(tmp_path):
    module = Faulty(dict.fromkeys(range(5, 1000), math.nan))
    trainer = train(tmp_path, module, guard_only(dry_run=True), epochs=4)
    assert trainer.global_step == 48
    assert sum("rollback" in reason for reason in reasons(trainer)) == 3
    assert len(reasons(trainer)) < 30


def test_without_a_guard_nothing_is_skipped(tmp_path):
    module = Faulty({4: math.nan})
    trainer = train(tmp_path, module, LearningRateController(guard=False))
    assert not torch.isfinite(weights(module)).all()
    assert not any("guard" in reason for reason in reasons(trainer))


def test_the_gradient_scaler_keeps_its_own_way_of_skipping(tmp_path):
    def fit(root, callbacks):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # overflows half precision at first
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        module = Faulty(lr=1e-3)
        trainer = quiet_trainer(root, callbacks=callbacks, plugins=[plugin], max_epochs=2)
        trainer.fit(module, text_loader(text_samples(48), batch_size=4))
        return module, scaler, trainer

    plain, scaler, _ = fit(tmp_path / "plain", [])
    assert scaler.get_scale() < 2.0**24
    controlled, own, trainer = fit(tmp_path / "controlled", [guard_only()])
    assert own.get_scale() == scaler.get_scale()
    assert torch.equal(weights(plain), weights(controlled))
    assert reasons(trainer) == []


def test_under_a_gradient_scaler_the_rate_is_multiplied_and_put_back(tmp_path):
    rates = []

    class Watched(Faulty):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.5)
            optimizer.register_step_pre_hook(lambda *_: None)
            optimizer.register_step_post_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
            return optimizer

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    controller = LearningRateController()
    trainer = quiet_trainer(tmp_path, callbacks=[controller], plugins=[plugin], max_epochs=1)
    trainer.fit(Watched(), text_loader(text_samples(48), batch_size=4))
    assert controller.factors["cap"] < 0.1
    assert all(rate < 0.05 for rate in rates)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def _rank(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
        RANK=str(rank),
        WORLD_SIZE="2",
    )

    class OneRank(Faulty):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.global_rank == 1 and self.global_step in (3, 9) else loss

    torch.manual_seed(0)
    module = OneRank(lr=0.1)
    controller = LearningRateController()
    trainer = quiet_trainer(folder, callbacks=[controller], devices=2, strategy="ddp", max_epochs=2)
    trainer.fit(module, text_loader(text_samples(64), batch_size=4))
    decisions = [decision.to_json() for decision in decision_log(trainer)]
    torch.save(
        {"weights": weights(module), "state": controller.state_dict(), "decisions": decisions}, f"{folder}/{rank}.pt"
    )


def test_two_ranks_act_alike_where_one_of_them_sees_a_nan(tmp_path):
    port = free_port()
    ranks = [FORKSERVER.Process(target=_rank, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.isfinite(first["weights"]).all()
    assert torch.equal(first["weights"], second["weights"])
    assert first["state"] == second["state"]
    assert first["decisions"] == second["decisions"]
    assert sum("not finite" in decision for decision in first["decisions"]) == 2


# The snapshot


def test_a_snapshot_restores_in_place_and_bit_for_bit():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(16, 4, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        optimizer.step()

    empty = HostSnapshot()
    empty.take(model, optimizer)
    start = weights(model)
    step()
    later = HostSnapshot()
    later.take(model, optimizer)
    identities = [id(p) for p in model.parameters()]
    step()
    after = weights(model)
    step()
    later.restore(model, optimizer)
    step()
    assert torch.equal(weights(model), after)
    empty.restore(model, optimizer)
    assert torch.equal(weights(model), start)
    assert not any(optimizer.state[p] for p in model.parameters())
    assert [id(p) for p in model.parameters()] == identities
    assert later.fits(model, optimizer)
    model[0].weight.data = model[0].weight.data[:4]
    assert not later.fits(model, optimizer)


def test_a_snapshot_from_before_a_group_joined_the_optimizer_still_goes_back():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(16, 4, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        optimizer.step()

    step()
    snapshot = HostSnapshot()
    snapshot.take(model, optimizer)
    before = weights(model)
    optimizer.add_param_group({"params": model[0].parameters()})
    step()
    once = weights(model)
    assert snapshot.fits(model, optimizer)
    snapshot.restore(model, optimizer)
    assert torch.equal(weights(model), before)
    step()
    assert torch.equal(weights(model), once)
