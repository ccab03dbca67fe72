"""The controller on real trainers: exact over every scheduler, resumable, and sound when things go wrong."""

from __future__ import annotations

import csv
import math
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch.optim import lr_scheduler

from adaptrain import AdaptiveCallback, ConfigurationError, LearningRateController, _lightning
from adaptrain._lightning.step_loss import tell_step_loss
from adaptrain.callbacks.base import decision_log
from adaptrain.policies.learning_rate import Align, Multiplier
from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, tiny_bert, weights

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.02, 0.002], total_steps=13),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [1e-3, 1e-4], [1e-2, 1e-3], 3, cycle_momentum=False),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=1.0),
}


class Scheduled(TextModule):
    """Two parameter groups of different rates, a scheduler, and a diary of the rates seen and used."""

    def __init__(self, scheduler: str | None = None, *, interval: str = "step", optimizer: str = "AdamW") -> None:
        super().__init__(tiny_bert(layers=1))
        self.scheduler_name = scheduler
        self.interval = interval
        self.optimizer_name = optimizer
        self.seen: list[tuple[float, ...]] = []
        self.used: list[tuple[float, ...]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(float(group["lr"]) for group in self.trainer.optimizers[0].param_groups))
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.used.append(tuple(float(group["lr"]) for group in optimizer.param_groups))

    def configure_optimizers(self):
        head = list(self.model.classifier.parameters())
        body = [p for n, p in self.model.named_parameters() if not n.startswith("classifier")]
        kwargs = {"momentum": 0.9} if self.optimizer_name == "SGD" else {}
        groups = [{"params": body, "lr": 1e-2}, {"params": head, "lr": 1e-3}]
        optimizer = getattr(torch.optim, self.optimizer_name)(groups, lr=1e-2, **kwargs)
        if self.scheduler_name is None:
            return optimizer
        config = {"scheduler": SCHEDULERS[self.scheduler_name](optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": config | {"monitor": "train/loss"}}


class Fixed(LearningRateController):
    """Multiplies by 3, whatever happens."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        align: Any = Align()
        align.log = math.log(3)
        self._multiplier = Multiplier(align=align)
        align.observe = lambda *_, **__: None


def train(root, module, controller=None, *, batches=12, **kwargs):
    callbacks = [] if controller is None else [controller]
    trainer = quiet_trainer(root, callbacks=callbacks, **kwargs)
    trainer.fit(module, text_loader(text_samples(4 * batches, variable=False), batch_size=4))
    return trainer


# Exactness


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_never_sees_the_product(tmp_path, scheduler, accumulate):
    plain, controlled = Scheduled(scheduler), Scheduled(scheduler)
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    train(tmp_path / "plain", plain, **settings)
    trainer = train(tmp_path / "controlled", controlled, Fixed(), **settings)
    if scheduler != "ReduceLROnPlateau":  # which looks at the loss
        assert controlled.seen == plain.seen
    for rates, seen in zip(controlled.used, controlled.seen[accumulate - 1 :: accumulate], strict=True):
        assert rates == pytest.approx([3 * rate for rate in seen])
    assert trainer.optimizers[0].param_groups[0]["lr"] <= 0.02 + 1e-9  # no schedule here goes above


def test_a_scheduler_stepped_per_epoch_never_sees_the_product(tmp_path):
    plain, controlled = Scheduled("ExponentialLR", interval="epoch"), Scheduled("ExponentialLR", interval="epoch")
    train(tmp_path / "plain", plain, max_epochs=3, batches=4)
    train(tmp_path / "controlled", controlled, Fixed(), max_epochs=3, batches=4)
    assert controlled.seen == plain.seen
    assert len(set(plain.seen)) == 3


def test_a_multiplier_of_one_changes_no_bit(tmp_path):
    plain, controlled = Scheduled(), Scheduled()
    train(tmp_path / "plain", plain)
    controller = LearningRateController(align=False, cap=False, plateau=False)
    train(tmp_path / "controlled", controlled, controller)
    assert controller.multiplier == 1.0
    assert torch.equal(weights(plain), weights(controlled))


def test_the_product_is_the_rate_it_says(tmp_path):
    """Training at 1e-2 with the multiplier 3 is training at 3e-2, decoupled weight decay included."""

    class Triple(Scheduled):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 3.0
            return optimizer

    triple, controlled = Triple(), Scheduled()
    train(tmp_path / "triple", triple)
    train(tmp_path / "controlled", controlled, Fixed())
    torch.testing.assert_close(weights(controlled), weights(triple), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("namespace", [pytorch_lightning, lightning.pytorch])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_rate_far_off_is_moved_the_right_way_in_both_namespaces(tmp_path, namespace, optimizer):
    class High(namespace.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = tiny_bert(layers=1), []

        training_step = TextModule.training_step
        on_train_batch_end = TextModule.on_train_batch_end

        def configure_optimizers(self):
            if optimizer == "SGD":
                return torch.optim.SGD(self.parameters(), lr=10.0, momentum=0.9)
            return torch.optim.AdamW(self.parameters(), lr=0.5)

    module = High()
    controller = LearningRateController()
    trainer = quiet_trainer(tmp_path, namespace=namespace, callbacks=[controller], max_epochs=4)
    trainer.fit(module, text_loader(text_samples(48)))
    assert controller.factors["cap"] < 0.5
    assert math.isfinite(module.losses[-1])
    assert any(d.knob == "learning_rate" and "cap" in d.reason for d in decision_log(trainer))
    assert trainer.optimizers[0].param_groups[0]["lr"] in (10.0, 0.5)


@pytest.mark.parametrize(
    ("cap", "before", "kappa", "annealed"),
    [(True, False, 0.13, 0.25), (True, True, 0.008, 1.0), (0.3, True, 0.3, 1.0), (False, True, None, None)],
)
def test_weights_that_were_trained_before_are_capped_at_shorter_steps(tmp_path, cap, before, kappa, annealed):
    module = TextModule(tiny_bert(layers=1), lr=1e-3)
    if before:
        quiet_trainer(tmp_path / "before", max_epochs=1).fit(module, text_loader(text_samples(24)))
    controller = LearningRateController(cap=cap)
    checkpoint = tmp_path / "cut.ckpt"
    trainer = quiet_trainer(tmp_path / "first", callbacks=[controller], max_epochs=1)
    trainer.fit(module, text_loader(text_samples(24)))
    trainer.save_checkpoint(checkpoint)
    resumed = LearningRateController(cap=cap)
    trainer = quiet_trainer(tmp_path / "second", callbacks=[resumed], max_epochs=2)
    trainer.fit(TextModule(tiny_bert(layers=1), lr=1e-3), text_loader(text_samples(24)), ckpt_path=str(checkpoint))
    for one in (controller, resumed):  # a run that is resumed goes on as it began
        assert one._multiplier is not None
        assert getattr(one._multiplier.cap, "kappa", None) == kappa
        assert getattr(one._multiplier.cap, "annealed", None) == annealed


def test_a_rate_too_low_is_raised_and_learns_more(tmp_path):
    plain, controlled = TextModule(tiny_bert(layers=1), lr=3e-5), TextModule(tiny_bert(layers=1), lr=3e-5)
    for module, callbacks in ((plain, []), (controlled, [controller := LearningRateController()])):
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=20)
        trainer.fit(module, text_loader(text_samples(48)))
    assert controller.factors["align"] > 1.2
    assert sum(controlled.losses[-6:]) < sum(plain.losses[-6:])
    assert len(decision_log(trainer)) < 40


class WarmedUp(TextModule):
    def __init__(self, steps: int, kind: str) -> None:
        super().__init__(tiny_bert(layers=1), lr=1e-6)
        self.steps = steps
        self.kind = kind

    def configure_optimizers(self):
        optimizer: Any = super().configure_optimizers()
        if self.kind == "one cycle":  # begins at a 25th of its peak, which `initial_lr` is of
            schedule: Any = lr_scheduler.OneCycleLR(optimizer, 1e-6, total_steps=10 * self.steps, pct_start=0.1)
        else:
            schedule = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("kind", ["linear", "one cycle"])
@pytest.mark.parametrize(("before", "steps", "raised"), [(False, 20, True), (False, 200, False), (True, 20, False)])
def test_fresh_weights_do_not_wait_for_the_end_of_a_warm_up_that_is_under_way(tmp_path, before, steps, raised, kind):
    module = WarmedUp(steps, kind)
    if before:
        module.lr = 1e-3
        quiet_trainer(tmp_path / "before", max_epochs=1).fit(module, text_loader(text_samples(24)))
        module.lr = 1e-6
    controller = LearningRateController()
    train(tmp_path, module, controller, batches=15)
    assert (controller.factors["align"] > 1) == raised


@pytest.mark.parametrize("namespace", [pytorch_lightning, lightning.pytorch])
def test_the_seam_tells_the_loss_of_a_step_before_the_step(tmp_path, namespace):
    told: list[float] = []

    class Listener(_lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            self.undo = tell_step_loss(trainer, lambda loss: told.append(float(loss)))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert len(told) == trainer.global_step + 1

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if _lightning.at_step_boundary(trainer):
                assert told[-1] == float(outputs["loss"])

        def on_train_end(self, trainer, pl_module):
            self.undo()
            assert "_optimizer_step" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)

    class Module(namespace.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = quiet_trainer(tmp_path, namespace=namespace, callbacks=[Listener()], accumulate_grad_batches=2)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(40, 2), batch_size=4))
    assert len(told) == 5


# Resuming, dry run


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_resumed_in_mid_window_equals_uninterrupted(tmp_path, optimizer, accumulate):
    def fit(root, epochs, ckpt=None):
        module = Scheduled("CosineAnnealingLR", optimizer=optimizer)
        controller = LearningRateController(cap=1e-6)
        trainer = quiet_trainer(
            root, callbacks=[controller], max_epochs=4, accumulate_grad_batches=accumulate, enable_checkpointing=False
        )
        trainer.fit_loop.max_epochs = epochs
        samples = text_samples(44)
        trainer.fit(module, text_loader(samples, batch_size=4), ckpt_path=ckpt)
        return trainer, module, controller

    _, whole, controller = fit(tmp_path / "whole", 4)
    trainer, _, _ = fit(tmp_path / "half", 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    _, resumed, again = fit(tmp_path / "half", 4, tmp_path / "half.ckpt")
    assert torch.equal(weights(whole), weights(resumed))
    assert again.state_dict() == controller.state_dict()
    assert controller.multiplier != 1.0


def test_a_dry_run_decides_and_changes_no_bit(tmp_path):
    class Faulty(Scheduled):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.global_step == 9 else loss

    plain, dry = Faulty(), Faulty()
    train(tmp_path / "plain", plain)
    controller = LearningRateController(dry_run=True)
    trainer = train(tmp_path / "dry", dry, controller)
    assert torch.allclose(weights(plain), weights(dry), rtol=0, atol=0, equal_nan=True)
    assert plain.used == dry.used
    decisions = list(decision_log(trainer))
    assert decisions
    assert not any(decision.applied for decision in decisions)
    assert any("not finite" in decision.reason for decision in decisions)


def test_everything_is_put_back_after_training_and_after_an_error(tmp_path):
    class Failing(Scheduled):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            if self.global_step == 5:
                raise KeyError("the user's own")

    module = Failing()
    trainer = quiet_trainer(tmp_path, callbacks=[Fixed()])
    with pytest.raises(KeyError):
        trainer.fit(module, text_loader())
    optimizer = trainer.optimizers[0]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert module.used[-1] == pytest.approx((3e-2, 3e-3))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert "_optimizer_step" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)


# Reacting to others


class Announcer(AdaptiveCallback):
    """Records one decision at a step, as another controller would."""

    def __init__(self, step, knob, old, new, **readings):
        super().__init__()
        self.at, self.decision = step, {"knob": knob, "old": old, "new": new, "reason": "told", "readings": readings}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            self.at = -1
            self.record(trainer, **self.decision)


def test_a_larger_global_batch_raises_the_rate_by_its_root(tmp_path):
    controller = LearningRateController(align=False, cap=False)
    callbacks = [controller, Announcer(3, "global_batch_size", 4, 64)]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=3)
    trainer.fit(module := Scheduled(), text_loader(text_samples(48), batch_size=4))
    assert controller.factors["batch"] == pytest.approx(4.0)
    assert module.used[2] == (1e-2, 1e-3)
    assert module.used[-1] == pytest.approx((4e-2, 4e-3))
    assert any(decision.reason.startswith("batch") for decision in decision_log(trainer))


def test_a_micro_batch_changes_nothing(tmp_path):
    controller = LearningRateController(align=False, cap=False)
    trainer = quiet_trainer(tmp_path, callbacks=[controller, Announcer(3, "micro_batch_size", 4, 64)])
    trainer.fit(Scheduled(), text_loader())
    assert controller.multiplier == 1.0


def test_pruning_opens_a_recovery_window_and_takes_the_weights_anew_as_reference(tmp_path):
    class Pruned(Scheduled):
        """Half of an FFN is cut out of the parameters and their optimizer state."""

        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step != 25:
                return
            layer = self.model.bert.encoder.layer[0]
            optimizer = self.trainer.optimizers[0]
            for parameter, dim in (
                (layer.intermediate.dense.weight, 0),
                (layer.intermediate.dense.bias, 0),
                (layer.output.dense.weight, 1),
            ):
                full = parameter.shape
                for state in (parameter, *optimizer.state[parameter].values()):
                    if state.shape == full:
                        state.data = state.data.narrow(dim, 0, 32).clone()
                parameter.grad = None

    controller = LearningRateController()
    callbacks = [controller, Announcer(25, "structure", 20000, 15000, removed=0.25)]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=4)
    module = Pruned("PolynomialLR")
    trainer.fit(module, text_loader(text_samples(48), batch_size=4))
    assert trainer.global_step == 48
    assert math.isfinite(module.losses[-1])
    names = [name for name, _ in (*module.model.bert.named_parameters(prefix="bert"),)]
    index = names.index("bert.encoder.layer.0.intermediate.dense.weight")
    whole = torch.linalg.vector_norm(tiny_bert(layers=1).bert.encoder.layer[0].intermediate.dense.weight).item()
    assert controller.state_dict()["references"][index] < 0.9 * whole


def test_recovery_follows_the_share_removed_late_in_the_schedule(tmp_path):
    class Late(Scheduled):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 10 else 0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    controller = LearningRateController(align=False, cap=False, plateau=False)
    callbacks = [controller, Announcer(12, "structure", 20000, 15000, removed=0.5)]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=4)
    trainer.fit(module := Late(), text_loader(text_samples(48), batch_size=4))
    assert max(rates[0] for rates in module.used[12:]) == pytest.approx(1e-3 * 2.5)
    assert module.used[-1][0] == pytest.approx(1e-3)


# Optimizers that go with less


def test_an_optimizer_without_a_direction_goes_without_align_and_cap_and_says_so(tmp_path):
    class Plain(Scheduled):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    controller = LearningRateController()
    trainer = train(tmp_path, Plain(), controller)
    reasons = [decision.reason for decision in decision_log(trainer)]
    assert reasons == ["SGD keeps no direction that can be read: align and cap stay off"]
    assert controller.multiplier == 1.0


def test_an_optimizer_that_sets_its_own_rate_gets_the_guard_alone(tmp_path):
    class AdamWScheduleFree(torch.optim.AdamW):
        pass

    class Free(Scheduled):
        def configure_optimizers(self):
            return AdamWScheduleFree(self.parameters(), lr=0.5)

    controller = LearningRateController()
    trainer = train(tmp_path, Free(), controller)
    assert "the guard alone is on" in next(iter(decision_log(trainer))).reason
    assert controller.factors == {"align": 1, "plateau": 1, "batch": 1, "recover": 1, "guard": 1, "cap": 1}


# Logging, refusals


def test_the_effective_rate_is_logged_per_group(tmp_path):
    logger = pytorch_lightning.loggers.CSVLogger(tmp_path)
    train(tmp_path, Scheduled(), Fixed(), logger=logger, log_every_n_steps=4)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["adaptrain/lr_multiplier"]]
    assert [row["step"] for row in rows] == ["3", "7", "11"]
    assert float(rows[0]["adaptrain/lr/0"]) == pytest.approx(3e-2)
    assert float(rows[0]["adaptrain/lr/1"]) == pytest.approx(3e-3)
    assert float(rows[0]["adaptrain/lr_multiplier"]) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cap": "yes"}, "cap must be True, False or the largest relative change in a step"),
        ({"cap": 0}, "a number above 0; got 0"),
        ({"align": "yes"}, "align must be one of True, False; got 'yes'"),
        ({"plateau": "sometimes"}, "plateau must be one of 'auto', True, False"),
        ({"batch_scaling": "cubic"}, "must be one of 'auto', 'sqrt', 'linear', 'adascale', None; got 'cubic'"),
        ({"mode": "up"}, "mode must be one of"),
        ({"monitor": "val/thing"}, "give mode='min' or mode='max'"),
    ],
)
def test_refuses_arguments_it_does_not_know(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        LearningRateController(**wrong)


def test_refuses_lbfgs_and_manual_optimization(tmp_path):
    class Lbfgs(Scheduled):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    class Manual(Scheduled):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ConfigurationError, match="LBFGS"):
        train(tmp_path, Lbfgs(), LearningRateController())
    with pytest.raises(ConfigurationError, match="automatic_optimization=False"):
        train(tmp_path, Manual(), LearningRateController())


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_refuses_a_module_without_an_optimizer(tmp_path):
    class Idle(Scheduled):
        def configure_optimizers(self):
            return None

    with pytest.raises(ConfigurationError, match=r"Idle\.configure_optimizers returned no optimizer"):
        train(tmp_path, Idle(), LearningRateController())


def test_plateau_watches_a_validation_metric_and_refuses_one_that_is_not_logged(tmp_path):
    class Validated(Scheduled):
        def validation_step(self, batch, batch_idx):
            self.log("val/accuracy", 0.5)

    controller = LearningRateController(align=False, cap=False, monitor="val/accuracy")
    trainer = quiet_trainer(tmp_path, callbacks=[controller], max_epochs=6)
    trainer.fit(Validated(), text_loader(), text_loader())
    assert controller.factors["plateau"] == 0.5
    trainer = quiet_trainer(tmp_path, callbacks=[LearningRateController(monitor="val/loss")], num_sanity_val_steps=0)
    with pytest.raises(ConfigurationError, match=r"monitor='val/loss', which is not logged.*val/accuracy"):
        trainer.fit(Validated(), text_loader(), text_loader())
