"""The global batch size through the controller: changes, their record, resume after a kill, ranks, and refusals."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader

from adaptrain import (
    BatchSizeController,
    BatchSizeRamp,
    ConfigurationError,
    GradientNoiseScale,
    LearningRateController,
    RandomState,
)
from adaptrain.callbacks.base import decision_log
from adaptrain.nlp.loader import ResumableLoader, ShuffledSampler
from tests.processes import free_port, run_python
from tests.toys import TextModule, join_ranks, quiet_trainer, text_samples, tiny_bert, weights

SAMPLES = 54


def numbered(count: int = SAMPLES) -> list[dict[str, Any]]:
    samples = text_samples(count, variable=False)
    for number, sample in enumerate(samples):
        sample["number"] = torch.tensor(number)
    return samples


class Numbered(TextModule):
    """Keeps which samples each batch held, by epoch."""

    def __init__(self, *, dropout: float = 0.0, lr: float = 1e-2) -> None:
        super().__init__(tiny_bert(dropout=dropout).double(), lr=lr)
        self.seen: list[tuple[int, list[int]]] = []

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["number"].tolist()))

    def training_step(self, batch, batch_idx):
        return super().training_step({k: v for k, v in batch.items() if k != "number"}, batch_idx)

    def by_epoch(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for epoch, numbers in self.seen:
            found.setdefault(epoch, []).extend(numbers)
        return {epoch: sorted(numbers) for epoch, numbers in found.items()}


def decisions(trainer: Any, knob: str = "global_batch_size") -> list[Any]:
    return [decision for decision in decision_log(trainer) if decision.knob == knob]


def train(root: Path, controller: Any, *callbacks: Any, loader: Any = None, module: Any = None, **settings: Any):
    module = module or Numbered()
    trainer = quiet_trainer(root, callbacks=[controller, *callbacks], **({"max_epochs": 4} | settings))
    trainer.fit(module, loader or DataLoader(numbered(), batch_size=8, shuffle=True))
    return module, trainer


def test_a_number_is_what_every_step_sees(tmp_path: Path) -> None:
    controller = BatchSizeController(micro_batch_size=4, global_batch_size=12)
    module, trainer = train(tmp_path, controller, accumulate_grad_batches=2, max_epochs=2)
    assert module.by_epoch() == {0: list(range(SAMPLES)), 1: list(range(SAMPLES))}
    assert [len(numbers) for _, numbers in module.seen[:9]] == [6] * 9  # two batches make a step of 12
    assert trainer.global_step == 10
    first = decisions(trainer)
    assert [(d.old, d.new, d.step) for d in first] == [(16, 12, 0)]

    # The same weights as with a loader of that size.
    loader = DataLoader(numbered(), batch_size=6)
    plain = Numbered()
    quiet_trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2).fit(plain, loader)
    module, _ = train(
        tmp_path,
        BatchSizeController(micro_batch_size=64, global_batch_size=12),
        loader=DataLoader(numbered(), batch_size=8),
        accumulate_grad_batches=2,
        max_epochs=2,
    )
    torch.testing.assert_close(weights(module), weights(plain), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_ramp_doubles_and_the_learning_rate_follows(workers: int, tmp_path: Path) -> None:
    controller = BatchSizeController(micro_batch_size=4, global_batch_size=BatchSizeRamp(begin=3, end=20, until=0.5))
    rate = LearningRateController(align=False, cap=False, plateau=False, recover=False, guard=False)
    loader = DataLoader(numbered(), batch_size=8, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    module, trainer = train(tmp_path, controller, rate, loader=loader)
    assert module.by_epoch() == {epoch: list(range(SAMPLES)) for epoch in range(4)}
    made = decisions(trainer)
    assert [(d.old, d.new) for d in made] == [(8, 3), (3, 6), (6, 12), (12, 20)]
    # What was recorded at a step is what the next one sees; only the last batch of an epoch is smaller.
    sizes = [len(numbers) for _, numbers in module.seen]
    for decision in made[1:]:
        assert sizes[decision.step] == decision.new
        assert sizes[decision.step - 1] <= decision.old
        assert ("ahead" in decision.readings) == (workers > 0)
    if not workers:
        samples = [sum(sizes[: decision.step]) / (4 * SAMPLES) for decision in made[1:]]
        assert samples == pytest.approx([0.167, 0.333, 0.5], abs=0.06)
    assert rate.factors["batch"] == pytest.approx((20 / 3) ** 0.5, rel=0.5)
    assert rate.factors["batch"] > 1.4


def test_the_default_leaves_the_loader_alone(tmp_path: Path) -> None:
    loader = DataLoader(numbered(), batch_size=8, shuffle=True)

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert trainer.train_dataloader is loader
            assert "setup_data" not in vars(trainer.fit_loop)

    _, trainer = train(tmp_path, BatchSizeController(micro_batch_size=4), Look(), loader=loader, max_epochs=1)
    assert not decisions(trainer)


def test_a_dry_run_records_and_changes_nothing(tmp_path: Path) -> None:
    ramp = BatchSizeRamp(begin=4, end=16, until=0.5)
    controller = BatchSizeController(micro_batch_size=4, global_batch_size=ramp, dry_run=True)
    loader = DataLoader(numbered(), batch_size=8)
    module, trainer = train(tmp_path, controller, loader=loader)
    assert [(d.old, d.new, d.applied) for d in decisions(trainer)] == [(8, 4, False), (4, 8, False), (8, 16, False)]
    plain = Numbered()
    quiet_trainer(tmp_path, max_epochs=4).fit(plain, DataLoader(numbered(), batch_size=8))
    assert torch.equal(weights(module), weights(plain))


def test_it_is_logged_and_validation_is_at_the_end(tmp_path: Path) -> None:
    from pytorch_lightning.loggers import CSVLogger

    controller = BatchSizeController(micro_batch_size=4, global_batch_size=BatchSizeRamp(begin=6, end=12))
    trainer = quiet_trainer(
        tmp_path, callbacks=[controller], logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=2
    )
    trainer.fit(Numbered(), DataLoader(numbered(), batch_size=8))
    assert trainer.callback_metrics["adaptrain/global_batch_size"] == 12


@pytest.mark.parametrize("namespace", [pl, lightning.pytorch], ids=["pl", "lightning"])
def test_both_namespaces(namespace: Any, tmp_path: Path) -> None:
    class Module(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)
            self.rows: list[int] = []

        def training_step(self, batch, batch_idx):
            self.rows.append(len(batch))
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    controller = BatchSizeController(micro_batch_size=64, global_batch_size=BatchSizeRamp(begin=4, end=16, until=0.4))
    trainer = quiet_trainer(tmp_path, namespace=namespace, callbacks=[controller], max_epochs=2)
    trainer.fit(module, DataLoader(torch.randn(50, 3), batch_size=8, shuffle=True))  # type: ignore[arg-type]
    assert sum(module.rows) == 100
    assert {4, 8, 16} <= set(module.rows)


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        (9, {"accumulate_grad_batches": 2}, r"global_batch_size=9 .* multiple of 2.*Use 8 or 10"),
        (1, {"accumulate_grad_batches": 2}, r"Use 2\."),
        (BatchSizeRamp(begin=4, end=18), {"accumulate_grad_batches": 4}, r"end=18 .* Use 16 or 20"),
        (8, {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}, "GradientAccumulationScheduler"),
    ],
)
def test_sizes_that_cannot_be_divided(size: Any, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    others = settings.pop("callbacks", [])
    module = Numbered()
    with pytest.raises(ConfigurationError, match=message):
        train(tmp_path, BatchSizeController(global_batch_size=size), *others, module=module, **settings)
    assert not module.seen


# The gradient's noise ------------------------------------------------------------------------------------------------


class KnownNoise(pl.LightningModule):
    """The loss is linear in the weights: a sample's gradient is the sample itself, and the weights never move."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
        self.second = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))
        self.rows: list[int] = []

    def training_step(self, batch, batch_idx):
        self.rows.append(len(batch))
        return (batch @ torch.cat([self.first, self.second])).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def known_noise(scale: float, count: int = 4096) -> tuple[torch.Tensor, float]:
    """Samples whose noise scale tr(Σ)/|G|² is about `scale`; and what it is exactly in these samples."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 50, generator=generator, dtype=torch.float64)
    samples = mean + noise * (scale * mean.square().sum() / 50).sqrt()
    return samples, float(samples.var(0).sum() / samples.mean(0).square().sum())


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"accumulate_grad_batches": 4}, marks=pytest.mark.slow)], ids=["plain", "accumulated"]
)
def test_the_noise_scale_is_measured_from_micro_batches(settings: dict[str, Any], tmp_path: Path) -> None:
    samples, truth = known_noise(64.0)
    policy = GradientNoiseScale(maximum=32, minimum=32, every=10, smoothing=0.995)
    controller = BatchSizeController(micro_batch_size=4, global_batch_size=policy)
    trainer = quiet_trainer(tmp_path, callbacks=[controller], max_epochs=8, **settings)
    loader = DataLoader(samples, batch_size=32, shuffle=True)  # type: ignore[arg-type]
    trainer.fit(KnownNoise(), loader)
    assert policy.scale.value == pytest.approx(truth, rel=0.25)
    assert policy.scale.noise == pytest.approx(float(samples.var(0).sum()), rel=0.1)


def test_the_batch_grows_to_the_noise_and_no_further(tmp_path: Path) -> None:
    samples, truth = known_noise(64.0)
    # Speed on a busy machine is no part of this.
    policy = GradientNoiseScale(maximum=1024, minimum=8, every=40, smoothing=0.98, slowdown=None)
    controller = BatchSizeController(micro_batch_size=4, global_batch_size=policy)
    rate = LearningRateController(align=False, cap=False, plateau=False, recover=False, guard=False)
    trainer = quiet_trainer(tmp_path, callbacks=[controller, rate], max_epochs=4)
    module = KnownNoise()
    trainer.fit(module, DataLoader(samples, batch_size=8, shuffle=True))  # type: ignore[arg-type]
    assert sum(module.rows) == 4 * len(samples)
    made = decisions(trainer)
    assert [(d.old, d.new) for d in made[:2]] == [(8, 16), (16, 32)]
    assert 32 <= made[-1].new <= 128
    assert made[-1].readings["noise_scale"] == pytest.approx(truth, rel=0.8)
    assert "noise scale" in made[-1].reason
    assert rate.factors["batch"] > 1.5


class SlowWhenLarge(KnownNoise):
    """As where memory is swapped: a sample costs eight times as much in steps above 16 samples."""

    def on_train_batch_start(self, batch, batch_idx):
        time.sleep(len(batch) * (0.004 if len(batch) > 16 else 0.0005))


def test_a_growth_that_costs_speed_is_taken_back_and_the_learning_rate_follows(tmp_path: Path) -> None:
    samples, _ = known_noise(64.0, count=1800)
    policy = GradientNoiseScale(maximum=64, minimum=8, every=25, slowdown=0.5)
    controller = BatchSizeController(micro_batch_size=4, global_batch_size=policy)
    rate = LearningRateController(
        align=False, cap=False, plateau=False, recover=False, guard=False, batch_scaling="sqrt"
    )
    trainer = quiet_trainer(tmp_path, callbacks=[controller, rate])
    module = SlowWhenLarge()
    trainer.fit(module, DataLoader(samples, batch_size=8, shuffle=True))  # type: ignore[arg-type]
    made = decisions(trainer)
    assert [(d.old, d.new) for d in made] == [(8, 16), (16, 32), (32, 16)]
    assert module.rows.count(4) > 0
    assert made[2].step - made[1].step == 20
    assert made[2].readings["samples_per_s"] < 0.5 * made[2].readings["samples_per_s_before"]
    assert made[2].readings["samples_per_s"] < 1 / 0.004
    assert rate.factors["batch"] == pytest.approx(2**0.5, rel=1e-3)


def test_the_learning_rate_gains_what_the_measured_noise_allows(tmp_path: Path) -> None:
    samples, _ = known_noise(64.0, count=1800)
    policy = GradientNoiseScale(maximum=32, minimum=8, every=25, slowdown=None)
    controller = BatchSizeController(micro_batch_size=4, global_batch_size=policy)
    rate = LearningRateController(align=False, cap=False, plateau=False, recover=False, guard=False)
    trainer = quiet_trainer(tmp_path, callbacks=[controller, rate])
    trainer.fit(KnownNoise(), DataLoader(samples, batch_size=8, shuffle=True))  # type: ignore[arg-type]
    made = decisions(trainer)
    assert made[-1].new == 32
    noise = made[-1].readings["noise_scale"]
    assert rate.factors["batch"] == pytest.approx((1 + noise / 8) / (1 + noise / 32), rel=1e-6)
    assert 1 < rate.factors["batch"] < 4


def test_where_nothing_can_be_measured_it_says_so(tmp_path: Path) -> None:
    samples, _ = known_noise(64.0, count=1000)
    controller = BatchSizeController(micro_batch_size=64, global_batch_size=GradientNoiseScale(maximum=64))
    trainer = quiet_trainer(tmp_path, callbacks=[controller])
    with pytest.warns(UserWarning, match="could measure nothing"):
        trainer.fit(KnownNoise(), DataLoader(samples, batch_size=8))  # type: ignore[arg-type]
    assert not decisions(trainer)


def test_an_error_and_a_replay_leave_the_measurement_right(tmp_path: Path) -> None:
    class RunsOut(KnownNoise):
        def training_step(self, batch, batch_idx):
            if len(batch) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    def measured(module: KnownNoise, size: int) -> dict[str, Any]:
        samples, _ = known_noise(64.0, count=256)
        policy = GradientNoiseScale(maximum=32, minimum=32)
        controller = BatchSizeController(micro_batch_size=size, global_batch_size=policy)
        trainer = quiet_trainer(tmp_path, callbacks=[controller])
        trainer.fit(module, DataLoader(samples, batch_size=32))  # type: ignore[arg-type]
        return policy.state_dict()["scale"]

    assert measured(RunsOut(), 16) == pytest.approx(measured(KnownNoise(), 4))


# Killed and resumed --------------------------------------------------------------------------------------------------


class KillAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(kind: str, workers: int) -> DataLoader[Any]:
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "batch_size": 8}
    samples: Any = numbered()
    if kind == "adaptrain":
        return ResumableLoader(samples, sampler=ShuffledSampler(samples, seed=4), **options)
    generator = torch.Generator().manual_seed(7) if kind == "generator" else None
    return DataLoader(samples, shuffle=True, generator=generator, **options)


def fit_resumable(
    folder: Path, kind: str, workers: int, *, kill_at: int | None = None, resume: bool = False, accumulate: int = 1
) -> dict[str, Any]:
    torch.manual_seed(3 if not resume else 55)
    module = Numbered(dropout=0.1)
    ramp = BatchSizeRamp(begin=4 * accumulate, end=16 * accumulate, until=0.5)
    checkpoints = ModelCheckpoint(dirpath=folder, save_top_k=0, save_last=True, every_n_train_steps=1)
    callbacks: list[Any] = [RandomState(), BatchSizeController(micro_batch_size=4, global_batch_size=ramp), checkpoints]
    if kill_at is not None:
        callbacks.append(KillAt(kill_at))
    trainer = quiet_trainer(
        folder, callbacks=callbacks, max_epochs=3, enable_checkpointing=True, accumulate_grad_batches=accumulate
    )
    trainer.fit(module, resumable(kind, workers), ckpt_path=str(folder / "last.ckpt") if resume else None)
    return {
        "weights": weights(module).tolist(),
        "losses": module.losses,
        "seen": module.seen,
        "decisions": [json.loads(d.to_json()) for d in decisions(trainer)],
        "step": trainer.global_step,
    }


@pytest.mark.parametrize(
    ("kind", "workers", "accumulate"),
    [
        ("generator", 0, 1),
        ("global", 0, 1),
        ("adaptrain", 0, 2),
        ("generator", 2, 1),
        pytest.param("adaptrain", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_middle_of_an_epoch_it_goes_on_with_the_remaining_samples(
    kind: str, workers: int, accumulate: int, tmp_path: Path
) -> None:
    whole = fit_resumable(tmp_path / "whole", kind, workers, accumulate=accumulate)
    sizes = {len(numbers) for _, numbers in whole["seen"]}
    assert {4, 8, 16} <= sizes
    # Killed in epoch 1 among batches of the second size: after the first change, before the last.
    changes = [d["step"] for d in whole["decisions"][1:]]
    kill_at = (changes[0] + changes[1]) // 2
    folder = tmp_path / "killed"
    done = run_python("-m", __name__, "kill", folder, kind, workers, kill_at, accumulate)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    resumed = fit_resumable(folder, kind, workers, resume=True, accumulate=accumulate)
    rest = len(resumed["seen"])
    assert 0 < rest < len(whole["seen"])
    assert resumed["seen"] == whole["seen"][-rest:]
    assert resumed["losses"] == whole["losses"][-rest:]
    assert resumed["weights"] == whole["weights"]
    assert resumed["step"] == whole["step"]
    assert [(d["step"], d["new"]) for d in resumed["decisions"]] == [(d["step"], d["new"]) for d in whole["decisions"]]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    def run(folder: Path, epochs: int, ckpt: Path | None = None) -> Numbered:
        torch.manual_seed(1 if ckpt is None else 2)
        module = Numbered()
        saved = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0)
        controller = BatchSizeController(micro_batch_size=4, global_batch_size=12)
        trainer = quiet_trainer(
            folder, callbacks=[controller, RandomState(), saved], max_epochs=epochs, enable_checkpointing=True
        )
        trainer.fit(module, resumable("generator", 0), ckpt_path=None if ckpt is None else str(ckpt))
        return module

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "part", 1)
    resumed = run(tmp_path / "rest", 3, tmp_path / "part" / "last.ckpt")
    assert resumed.seen == whole.seen[5:]
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_without_it_are_refused(tmp_path: Path) -> None:
    def write(folder: Path, *callbacks: Any) -> str:
        class SaveAt(pl.Callback):
            def on_train_batch_end(
                self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                if batch_idx == 2:
                    trainer.save_checkpoint(folder / "middle.ckpt")

        trainer = quiet_trainer(folder, callbacks=[SaveAt(), *callbacks])
        trainer.fit(Numbered(), resumable("adaptrain", 0))
        return str(folder / "middle.ckpt")

    without = write(tmp_path / "without")
    again = quiet_trainer(tmp_path, callbacks=[BatchSizeController(global_batch_size=12)], max_epochs=2)
    with pytest.raises(ConfigurationError, match="without global_batch_size"):
        again.fit(Numbered(), resumable("adaptrain", 0), ckpt_path=without)

    having = write(tmp_path / "with", BatchSizeController(global_batch_size=12))
    again = quiet_trainer(tmp_path, max_epochs=2)
    with pytest.raises(ConfigurationError, match="in a run with global_batch_size"):
        again.fit(Numbered(), resumable("adaptrain", 0), ckpt_path=having)


# Two ranks -----------------------------------------------------------------------------------------------------------


class SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit_with_workers(folder: Path, *, resume: bool) -> dict[str, Any]:
    """On two ranks, with workers that persist, and without the last smaller batch; saves in the middle of epoch 1."""
    module = Numbered()
    ramp = BatchSizeRamp(begin=8, end=24, until=0.6)
    saves = [] if resume else [SaveAt(10, folder / "middle.ckpt")]
    trainer = quiet_trainer(
        folder,
        strategy="ddp",
        devices=2,
        callbacks=[BatchSizeController(micro_batch_size=3, global_batch_size=ramp), *saves],
        max_epochs=3,
    )
    loader = DataLoader(numbered(), batch_size=8, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    trainer.fit(module, loader, ckpt_path=str(folder / "middle.ckpt") if resume else None)
    return {
        "seen": module.seen,
        "weights": weights(module),
        "decisions": [(d.step, d.old, d.new) for d in decisions(trainer)],
    }


def worker(rank: int, folder: str, port: int) -> None:
    join_ranks(rank, port)
    warnings.simplefilter("ignore")
    module = Numbered()
    ramp = BatchSizeRamp(begin=8, end=24, until=0.6)
    controller = BatchSizeController(micro_batch_size=3, global_batch_size=ramp)
    trainer = quiet_trainer(Path(folder), strategy="ddp", devices=2, callbacks=[controller], max_epochs=3)
    trainer.fit(module, DataLoader(numbered(), batch_size=8, shuffle=True))  # type: ignore[arg-type]
    noisy, truth = known_noise(64.0)
    policy = GradientNoiseScale(maximum=32, minimum=32, smoothing=0.99)
    measuring = quiet_trainer(
        Path(folder),
        strategy="ddp",
        devices=2,
        callbacks=[BatchSizeController(micro_batch_size=16, global_batch_size=policy)],
        max_epochs=4,
        accumulate_grad_batches=2,
    )
    measuring.fit(KnownNoise(), DataLoader(noisy, batch_size=8, shuffle=True))  # type: ignore[arg-type]
    odd = quiet_trainer(
        Path(folder), strategy="ddp", devices=2, callbacks=[BatchSizeController(global_batch_size=9)], max_epochs=1
    )
    try:
        odd.fit(Numbered(), DataLoader(numbered(), batch_size=8))  # type: ignore[arg-type]
        refused = ""
    except ConfigurationError as error:
        refused = str(error)
    result = {
        "workers": [fit_with_workers(Path(folder), resume=resume) for resume in (False, True)],
        "weights": weights(module),
        "seen": module.seen,
        "refused": refused,
        "noise": policy.scale.value,
        "truth": truth,
        "decisions": [(d.step, d.old, d.new) for d in decisions(trainer)],
    }
    torch.save(result, Path(folder) / f"rank{rank}.pt")


def test_two_ranks_agree_and_share_every_sample(tmp_path: Path) -> None:
    done = run_python("-m", __name__, "ddp", tmp_path, free_port())
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["weights"], second["weights"])
    assert first["decisions"] == second["decisions"]
    assert [(old, new) for _, old, new in first["decisions"]] == [(16, 8), (8, 16), (16, 24)]
    assert [len(numbers) for _, numbers in first["seen"]] == [len(numbers) for _, numbers in second["seen"]]
    assert {4, 8, 12} <= {len(numbers) for _, numbers in first["seen"]}
    for epoch in range(3):
        both = [n for rank in (first, second) for e, numbers in rank["seen"] if e == epoch for n in numbers]
        assert sorted(both) == list(range(SAMPLES))
    assert "2 ranks" in first["refused"]
    assert first["noise"] == second["noise"]
    assert first["noise"] == pytest.approx(first["truth"], rel=0.35)

    for rank in (first, second):
        whole, resumed = rank["workers"]
        rest = len(resumed["seen"])
        assert resumed["seen"] == whole["seen"][10:]
        assert 0 < rest < len(whole["seen"]) - 7  # in the middle of epoch 1
        assert torch.equal(resumed["weights"], whole["weights"])
        assert torch.equal(whole["weights"], first["workers"][0]["weights"])
        assert {4, 8} <= {len(numbers) for _, numbers in whole["seen"]} <= {4, 8, 12}  # none is smaller
        assert whole["decisions"] == first["workers"][0]["decisions"]
        assert resumed["decisions"][-2:] == whole["decisions"][1:]  # rank 1 keeps no file of those before
    for epoch in range(3):
        seen = [
            n for rank in (first, second) for e, numbers in rank["workers"][0]["seen"] if e == epoch for n in numbers
        ]
        assert len(set(seen)) == len(seen) > SAMPLES - 2 * 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["kill", "ddp"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("rest", nargs="*")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.mode == "ddp":
        mp.start_processes(worker, args=(str(args.folder), int(args.rest[0])), nprocs=2, start_method="fork")
        return
    kind, workers, kill_at, accumulate = args.rest
    fit_resumable(args.folder, kind, int(workers), kill_at=int(kill_at), accumulate=int(accumulate))
    raise SystemExit("was not killed")


if __name__ == "__main__":
    main()
