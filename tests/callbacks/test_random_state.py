"""RandomState: a resumed run equals the run that was never killed, wherever the checkpoint was taken."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from adaptrain import RandomState
from adaptrain.callbacks.random_state import capture_random_state, restore_random_state
from tests.processes import run_ranks
from tests.toys import TextModule, ValidatedTextModule, quiet_trainer, text_loader, text_samples, tiny_bert

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")


class ResumableLoader:
    """Batches in fixed order that go on where they were; samples are augmented with the global generators."""

    def __init__(self, samples: list[Any], batch_size: int = 8) -> None:
        self.batches = list(DataLoader(samples, batch_size=batch_size))  # type: ignore[arg-type]
        self.next = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        torch.rand(())  # as torch's loader draws a seed for its workers
        if self.next == len(self.batches):
            self.next = 0
        return self.rest()

    def rest(self) -> Iterator[Any]:
        while self.next < len(self.batches):
            batch = {name: value.clone() for name, value in self.batches[self.next].items()}
            self.next += 1
            batch["input_ids"][:, random.randrange(4)] = 5 + np.random.randint(8)
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Save(pl.Callback):
    """Saves in one hook at one step, as a run killed right after would have left it."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        def save(trainer: Any, *_: Any) -> None:
            if trainer.global_step == step and not path.exists():
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


def dropping(kind: type[TextModule] = TextModule) -> TextModule:
    return kind(tiny_bert(dropout=0.2))


def uninterrupted_and_resumed(
    tmp_path: Path, hook: str, step: int, loader: Any, *, callback: Any = RandomState, **kwargs: Any
) -> tuple[list[float], list[float]]:
    path = tmp_path / "killed.ckpt"
    path.unlink(missing_ok=True)
    validation = text_loader(text_samples(8, seed=3))
    whole = dropping(ValidatedTextModule)
    pl.seed_everything(7, verbose=False)
    settings = {"max_epochs": 3, "num_sanity_val_steps": 0} | kwargs
    trainer = quiet_trainer(tmp_path, callbacks=[callback(), Save(hook, step, path)], **settings)
    trainer.fit(whole, loader(), validation)

    pl.seed_everything(8, verbose=False)  # a new process would start elsewhere
    rest = dropping(ValidatedTextModule)
    quiet_trainer(tmp_path, callbacks=[callback()], **settings).fit(rest, loader(), validation, ckpt_path=path)
    assert rest.losses
    return whole.losses[-len(rest.losses) :], rest.losses


def resumable() -> ResumableLoader:
    return ResumableLoader(text_samples(32))


def shuffled() -> DataLoader:
    return text_loader(text_samples(32), shuffle=True)


def test_kill_in_mid_epoch_with_dropout_and_augmentation(tmp_path: Path) -> None:
    whole, rest = uninterrupted_and_resumed(tmp_path, "on_train_batch_end", 6, resumable)
    assert len(rest) == 6
    assert rest == whole


def test_without_it_the_runs_differ(tmp_path: Path) -> None:
    whole, rest = uninterrupted_and_resumed(tmp_path, "on_train_batch_end", 6, resumable, callback=pl.Callback)
    assert rest[0] != whole[0]


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("loader", [shuffled, resumable])
def test_kill_between_epochs_repeats_the_shuffle(tmp_path: Path, hook: str, loader: Any) -> None:
    whole, rest = uninterrupted_and_resumed(tmp_path, hook, 4, loader)
    assert len(rest) == 8
    assert rest == whole


def test_kill_in_mid_epoch_at_a_validation(tmp_path: Path) -> None:
    whole, rest = uninterrupted_and_resumed(tmp_path, "on_validation_end", 6, resumable, val_check_interval=2)
    assert len(rest) == 6
    assert rest == whole


def test_kill_in_mid_epoch_under_accumulation(tmp_path: Path) -> None:
    whole, rest = uninterrupted_and_resumed(
        tmp_path, "on_train_batch_end", 1, resumable, accumulate_grad_batches=2, limit_val_batches=0
    )
    assert rest == whole


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_with_lightning_s_own_checkpoint_callback(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(
        tmp_path, filename="{step}", auto_insert_metric_name=False, every_n_train_steps=3, save_top_k=-1
    )
    whole = dropping()
    quiet_trainer(tmp_path, callbacks=[RandomState(), checkpoints], enable_checkpointing=True, max_epochs=2).fit(
        whole, resumable()
    )
    rest = dropping()
    again = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    quiet_trainer(tmp_path, callbacks=[RandomState(), again], enable_checkpointing=True, max_epochs=2).fit(
        rest, resumable(), ckpt_path=tmp_path / "6.ckpt"
    )
    assert rest.losses == whole.losses[6:]


def test_a_new_run_keeps_its_seeds(tmp_path: Path) -> None:
    losses = []
    for callbacks in ([], [RandomState()]):
        pl.seed_everything(7, verbose=False)
        module = dropping()
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=2).fit(module, shuffled())
        losses.append(module.losses)
    assert losses[0] == losses[1]


def test_a_state_loaded_to_validate_does_not_reach_the_next_fit(tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    callback = RandomState()
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.fit(dropping(ValidatedTextModule), shuffled(), text_loader())
    trainer.save_checkpoint(path)
    losses = []
    for validate in (False, True):
        module = dropping(ValidatedTextModule)
        trainer = quiet_trainer(tmp_path, callbacks=[callback])
        if validate:
            trainer.validate(module, text_loader(), ckpt_path=path, verbose=False)
        module = dropping(ValidatedTextModule)
        pl.seed_everything(9, verbose=False)
        trainer.fit(module, shuffled(), text_loader())
        losses.append(module.losses)
    assert losses[0] == losses[1]


def test_state_is_plain_and_brings_every_generator_back(tmp_path: Path) -> None:
    state = RandomState().state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.loads(json.dumps(loaded)) == loaded

    def draw() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), random.random(), float(np.random.randn()), float(torch.randn(()))

    first = draw()
    between = capture_random_state()  # Python and NumPy keep the second half of a normal pair
    second = draw()
    restore_random_state(loaded["ranks"][0])
    assert draw() == first
    restore_random_state(between)
    assert draw() == second


@pytest.mark.gpu
def test_cuda_generator_comes_back() -> None:
    torch.rand((), device="cuda")
    state = capture_random_state()
    first = torch.rand(8, device="cuda")
    restore_random_state(state)
    assert torch.equal(torch.rand(8, device="cuda"), first)


def test_the_trainer_is_left_as_it_was(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[RandomState()])
    trainer.fit(TextModule(), text_loader())
    assert not {"setup_data", "_load_combined_loader_states"} & vars(trainer.fit_loop).keys()
    assert "on_run_start" not in vars(trainer.fit_loop.epoch_loop)


def test_pickles() -> None:
    pickle.loads(pickle.dumps(RandomState()))


def test_lightning_s_seam_stands(tmp_path: Path) -> None:
    """What the seam wraps and reads; if Lightning moves it, this says so."""
    seen: list[str] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            assert trainer.fit_loop._combined_loader._iterator is not None
            seen.append("start")

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            seen.append(f"batch {trainer.fit_loop.epoch_loop.batch_progress.current.ready}")

    class Loader(ResumableLoader):
        def __iter__(self) -> Iterator[Any]:
            seen.append("iter")
            return super().__iter__()

        def rest(self) -> Iterator[Any]:
            for batch in super().rest():
                seen.append("fetch")
                yield batch

    def noted(name: str, run: Any) -> Any:
        def wrap(*args: Any) -> None:
            seen.append(name)
            run(*args)

        return wrap

    trainer = quiet_trainer(tmp_path, callbacks=[Look()], max_epochs=2)
    fit_loop = trainer.fit_loop
    for loop, name in (
        (fit_loop, "setup_data"),
        (fit_loop, "_load_combined_loader_states"),
        (fit_loop.epoch_loop, "on_run_start"),
    ):
        setattr(loop, name, noted(name, getattr(loop, name)))
    trainer.fit(TextModule(), Loader(text_samples(16)))
    epoch = ["fetch", "batch 1", "fetch", "batch 2"]
    data = ["setup_data", "iter", "_load_combined_loader_states", "iter", "start"]
    assert seen == [*data, "setup_data", "on_run_start", *epoch, "setup_data", "on_run_start", "iter", *epoch]


@pytest.mark.slow
def test_each_rank_gets_its_own_state_back(tmp_path: Path) -> None:
    for done in run_ranks(__name__, tmp_path):
        assert done.returncode == 0, done.stderr
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for whole, rest in by_rank:
        assert len(rest) == 5
        assert rest == whole[3:]
    assert by_rank[0][0] != by_rank[1][0]
    ranks = torch.load(tmp_path / "killed.ckpt", weights_only=True)["callbacks"]["RandomState"]["ranks"]
    assert ranks[0]["torch"] != ranks[1]["torch"]


def train_rank(folder: Path, rank: int) -> None:
    """Trains as one of two ranks, whole and from a checkpoint, and writes the losses of both."""
    torch.set_num_threads(1)
    losses = []
    for seed, resumed in ((7, False), (8, True)):
        pl.seed_everything(seed + 100 * rank, verbose=False)
        module = TextModule(tiny_bert(dropout=0.2))
        path = folder / "killed.ckpt"
        trainer = quiet_trainer(
            folder,
            devices=2,
            strategy="ddp",
            max_epochs=2,
            use_distributed_sampler=False,
            callbacks=[RandomState(), *([] if resumed else [Save("on_train_batch_end", 3, path)])],
        )
        trainer.fit(module, ResumableLoader(text_samples(32)), ckpt_path=path if resumed else None)
        losses.append(module.losses)
    (folder / f"{rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    train_rank(Path(sys.argv[1]), int(os.environ["RANK"]))
