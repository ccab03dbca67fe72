"""The loader seam against Lightning itself: samples, counts, validation, progress bars, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

from adaptrain import BatchSizeController, BatchSizeRamp, ConfigurationError, _lightning
from adaptrain._lightning.loader import ResizableLoader
from tests.toys import quiet_trainer

SAMPLES = 53
NAMESPACES = pytest.mark.parametrize("namespace", [pytorch_lightning, lightning.pytorch], ids=["pl", "lightning"])


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index))


class Records:
    """Keeps the samples of every batch by epoch, and at how many samples of the epoch it was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: list[list[list[int]]] = []
        self.validated: list[tuple[int, int]] = []
        self.steps: list[int] = []
        self.totals: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch, batch_idx):
        self.epochs[-1].append(batch.int().tolist())
        self.totals.append(self.trainer.num_training_batches)
        return (self.weight * batch).mean()

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated.append((len(self.epochs), sum(map(len, self.epochs[-1]))))

    def on_before_optimizer_step(self, optimizer) -> None:
        self.steps.append(len(self.epochs[-1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Recorder(Records, pytorch_lightning.LightningModule):
    pass


class RecorderLightning(Records, lightning.pytorch.LightningModule):
    pass


class Resize(_lightning.Callback):
    """Changes the batch size after given batches of each epoch."""

    def __init__(self, changes: dict[int, int], *, first: int = 4) -> None:
        self.changes, self.first = changes, first
        self.starts: list[int | None] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.seam = ResizableLoader(trainer, first=lambda _: self.first, gather=lambda v: [v], callback="Resize")
        self.undo = self.seam.install()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seam.batch_done()
        if batch_idx + 1 in self.changes:
            self.starts.append(self.seam.resize(self.changes[batch_idx + 1]))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.undo()


def fit(
    root: Path, changes: dict[int, int], *, namespace: Any = pytorch_lightning, loader: Any = None, **settings: Any
):
    module: Any = Recorder() if namespace is pytorch_lightning else RecorderLightning()
    callback = Resize(changes)
    trainer = quiet_trainer(root, namespace=namespace, callbacks=[callback], **({"max_epochs": 3} | settings))
    data = loader if loader is not None else DataLoader(Numbers(), batch_size=8, shuffle=True)
    trainer.fit(module, data, DataLoader(Numbers(), batch_size=53))
    return module, callback, trainer


def flat(batches: list[list[int]]) -> list[int]:
    return sorted(index for batch in batches for index in batch)


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("drop_last", [False, True])
@NAMESPACES
def test_every_sample_once_and_validation_at_the_true_end(
    namespace: Any, drop_last: bool, workers: int, persistent: bool, tmp_path: Path
) -> None:
    loader = DataLoader(
        Numbers(), batch_size=8, shuffle=True, drop_last=drop_last, num_workers=workers, persistent_workers=persistent
    )
    module, callback, trainer = fit(tmp_path, {2: 3, 5: 7}, namespace=namespace, loader=loader)
    assert len(module.epochs) == 3
    for epoch in module.epochs:
        seen = flat(epoch)
        assert len(set(seen)) == len(seen)
        assert len(seen) == SAMPLES or (drop_last and SAMPLES - len(seen) < 7)
    ahead = 4 if workers else 0  # two batches for each worker are taken ahead
    assert callback.starts[:2] == [2 + ahead, 5 + ahead]
    sizes = [len(batch) for batch in module.epochs[0]]
    assert sizes[: 5 + ahead] == [4] * (2 + ahead) + [3] * 3
    # After every epoch, with all its samples seen.
    assert module.validated == [(n + 1, sum(map(len, epoch))) for n, epoch in enumerate(module.epochs)]
    assert module.totals[-1] == len(module.epochs[-1])
    assert trainer.global_step == sum(map(len, module.epochs))
    # The user's loader was left alone.
    assert type(loader) is DataLoader
    assert type(loader.batch_sampler) is BatchSampler
    assert "setup_data" not in vars(trainer.fit_loop)
    assert "process_dataloader" not in vars(trainer.strategy)


def test_an_accumulation_window_keeps_its_size(tmp_path: Path) -> None:
    loader = DataLoader(Numbers(), batch_size=8, num_workers=2, shuffle=True)
    module, callback, _ = fit(tmp_path, {3: 2, 9: 6}, loader=loader, accumulate_grad_batches=3, max_epochs=2)
    assert callback.starts[:2] == [9, 15]  # 7 and 13 were the next, in the middle of a window
    for epoch in module.epochs:
        assert flat(epoch) == list(range(SAMPLES))
        windows = [{len(batch) for batch in epoch[begin : begin + 3]} for begin in range(0, len(epoch) - 3, 3)]
        assert all(len(sizes) == 1 for sizes in windows[:-1])
    last = len(module.epochs[0])
    assert module.steps[: math.ceil(last / 3)] == [*range(3, last, 3), last]


def test_a_change_does_not_make_the_batch_just_done_the_last(tmp_path: Path) -> None:
    loader = DataLoader(Numbers(), batch_size=8, drop_last=True)
    module, callback, _ = fit(tmp_path, {11: 10, 13: 1}, loader=loader, max_epochs=2)
    # After 11 batches of 4, 9 samples are left: not one batch of 10. After 13, the last one, it is too late as well.
    assert callback.starts == [None, None, None, None]
    assert [len(epoch) for epoch in module.epochs] == [13, 13]


def test_the_epochs_shares_go_by_samples(tmp_path: Path) -> None:
    module, _, _ = fit(tmp_path, {4: 12}, val_check_interval=0.5, max_epochs=2)
    # Of 53: with the last batch before 26.5, and at the end. Epoch 2 is of one size: as Lightning does.
    assert module.validated == [(1, 16), (1, 53), (2, 24), (2, 48)]
    module, _, _ = fit(tmp_path, {7: 1}, val_check_interval=0.5, max_epochs=1)
    assert module.validated == [(1, 28), (1, 53)]  # with batch 7 of 14, as planned before the change right there
    module, _, _ = fit(tmp_path, {6: 1}, val_check_interval=0.25, max_epochs=1)
    assert module.validated == [(1, 12), (1, 24), (1, 39), (1, 53)]
    module, _, _ = fit(tmp_path, {2: 2}, limit_train_batches=0.5, max_epochs=1)
    assert sum(map(len, module.epochs[0])) == 26
    assert module.validated == [(1, 26)]


def test_whole_numbers_go_by_batches(tmp_path: Path) -> None:
    module, _, _ = fit(tmp_path, {2: 12}, limit_train_batches=4, max_epochs=1)
    assert [len(batch) for batch in module.epochs[0]] == [4, 4, 12, 12]
    module, _, _ = fit(tmp_path, {4: 12}, val_check_interval=3, max_epochs=1)
    assert [len(batch) for batch in module.epochs[0]] == [4] * 4 + [12] * 3 + [1]
    assert module.validated == [(1, 12), (1, 40)]
    # An epoch that became shorter than the interval is validated at its end.
    module, _, _ = fit(tmp_path, {1: 30}, val_check_interval=10, max_epochs=1)
    assert module.validated == [(1, 53)]


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_progress_bars_show_the_total_that_holds(kind: str, tmp_path: Path, capsys: Any) -> None:
    from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar

    bar = TQDMProgressBar() if kind == "tqdm" else RichProgressBar()
    callback = Resize({2: 9})
    totals = []

    class Look(pytorch_lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            totals.append(bar.train_progress_bar.total)

    trainer = quiet_trainer(tmp_path, callbacks=[callback, bar, Look()], enable_progress_bar=True)
    trainer.fit(Recorder(), DataLoader(Numbers(), batch_size=8), DataLoader(Numbers(), batch_size=53))
    assert totals == [14, 7, 7, 7, 7, 7, 7]


def test_the_number_of_steps_can_be_asked_for_beforehand(tmp_path: Path) -> None:
    class Asks(Recorder):
        def configure_optimizers(self):
            self.asked = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module, callback = Asks(), Resize({3: 10})
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2)
    trainer.fit(module, DataLoader(Numbers(), batch_size=8, shuffle=True), DataLoader(Numbers(), batch_size=53))
    assert module.asked == 2 * math.ceil(53 / 4)
    assert [flat(epoch) for epoch in module.epochs] == [list(range(53))] * 2


def test_loaders_that_are_made_anew(tmp_path: Path) -> None:
    class Makes(Recorder):
        def train_dataloader(self):
            return DataLoader(Numbers(), batch_size=8, shuffle=True)

    module, callback = Makes(), Resize({2: 9})
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=3, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module, val_dataloaders=DataLoader(Numbers(), batch_size=53))
    assert [flat(epoch) for epoch in module.epochs] == [list(range(53))] * 3
    assert [len(epoch[0]) for epoch in module.epochs] == [4, 9, 9]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(8.0))


class OwnIteration(DataLoader):
    def __iter__(self):
        return super().__iter__()


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (
            lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(RandomSampler(range(53)), 4, False)),
            "its own Batch",
        ),
        (lambda: DataLoader(Numbers(), batch_size=None), "no batch_size"),
        (lambda: DataLoader(Stream(), batch_size=4), "IterableDataset"),
        (lambda: [torch.zeros(3)] * 2, "not several at once|is a Tensor"),
        (lambda: {"a": DataLoader(Numbers()), "b": DataLoader(Numbers())}, "not several at once"),
        (lambda: OwnIteration(Numbers(), batch_size=4), "how OwnIteration iterates"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_loaders_that_are_refused(loader: Any, reason: str, dry_run: bool, tmp_path: Path) -> None:
    module = Recorder()
    controller = BatchSizeController(micro_batch_size=2, global_batch_size=16, dry_run=dry_run)
    trainer = quiet_trainer(tmp_path, callbacks=[controller])
    with pytest.raises(ConfigurationError, match=reason if not dry_run else "global_batch_size") as error:
        trainer.fit(module, loader(), DataLoader(Numbers(), batch_size=53))
    assert "global_batch_size=None" in str(error.value)
    assert "process_dataloader" not in vars(trainer.strategy)
    assert not any(module.epochs)


def test_a_step_that_takes_batches_itself_is_refused(tmp_path: Path) -> None:
    class Takes(Recorder):
        def training_step(self, dataloader_iter):
            raise AssertionError

    trainer = quiet_trainer(tmp_path, callbacks=[BatchSizeController(global_batch_size=16)])
    warned = pytest.warns(UserWarning, match="dataloader_iter")
    with warned, pytest.raises(ConfigurationError, match="dataloader_iter"):
        trainer.fit(Takes(), DataLoader(Numbers(), batch_size=8), DataLoader(Numbers(), batch_size=53))


def test_a_moved_seam_fails_loudly(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    seam = ResizableLoader(trainer, first=lambda size: size, gather=lambda v: [v], callback="Test")
    # What the seam reads and sets; Lightning of either namespace has it.
    fit_loop = trainer.fit_loop
    for owner, names in (
        (fit_loop, ("_combined_loader", "_combined_loader_states_to_load", "_data_fetcher", "max_batches")),
        (fit_loop.epoch_loop, ("batch_progress",)),
        (trainer, ("val_check_interval", "limit_train_batches", "progress_bar_callback")),
    ):
        assert all(hasattr(owner, name) for name in names)
    moved = type("Moved", (), {"setup_data": None})()
    seam._fit_loop = moved
    with pytest.raises(RuntimeError, match="has no"):
        seam.install()


def test_samplers_of_other_kinds(tmp_path: Path) -> None:
    loader = DataLoader(Numbers(), batch_size=8, sampler=WeightedRandomSampler([1.0] * 53, 40))
    module, _, _ = fit(tmp_path, {2: 10}, loader=loader, max_epochs=2)
    assert [sum(map(len, epoch)) for epoch in module.epochs] == [40, 40]


def test_the_share_of_the_run_never_falls(tmp_path: Path) -> None:
    shares = []

    class Look(pytorch_lightning.Callback):
        def note(self, trainer: Any, *_: Any) -> None:
            shares.append(_lightning.progress(trainer))

        on_train_epoch_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = note

    controller = BatchSizeController(micro_batch_size=4, global_batch_size=BatchSizeRamp(begin=2, end=32, until=0.9))
    trainer = quiet_trainer(tmp_path, callbacks=[controller, Look()], max_epochs=3)
    trainer.fit(Recorder(), DataLoader(Numbers(), batch_size=8), DataLoader(Numbers(), batch_size=53))
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1
