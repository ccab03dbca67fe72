"""GracefulStop: real signals to real runs, and what a resume makes of the checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from adaptrain import GracefulStop, RandomState, _lightning
from adaptrain.callbacks.graceful_stop import TrainingInterrupted
from tests.callbacks.test_random_state import ResumableLoader
from tests.processes import run_ranks
from tests.toys import TextModule, ValidatedTextModule, quiet_trainer, text_loader, text_samples, tiny_bert

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX does")


class Signal(pl.Callback):
    """Sends this process a signal in one hook at one step, and notes the hooks that ran."""

    def __init__(self, hook: str = "", step: int = -1, *signals: signal.Signals) -> None:
        self.seen: list[str] = []
        for name in ("on_train_epoch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end"):
            setattr(self, name, self.noted(name, send=name == hook, step=step, signals=signals))

    def noted(self, name: str, *, send: bool, step: int, signals: Any) -> Any:
        def run(trainer: Any, *_: Any) -> None:
            self.seen.append(f"{name} {trainer.global_step}")
            if send and trainer.global_step == step:
                for signum in signals:
                    os.kill(os.getpid(), signum)

        return run


def module() -> ValidatedTextModule:
    return ValidatedTextModule(tiny_bert(dropout=0.2))


def fit(tmp_path: Path, sender: Signal, *, ckpt_path: Path | None = None, **kwargs: Any) -> list[float]:
    """Trains 2 epochs of 4 batches; returns the losses seen until the end or the interruption."""
    pl.seed_everything(1, verbose=False)
    trained = module()
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0} | kwargs
    callbacks = [GracefulStop(), RandomState(), sender, *settings.pop("callbacks", [])]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, **settings)
    try:
        trainer.fit(trained, ResumableLoader(text_samples(32)), text_loader(text_samples(8)), ckpt_path=ckpt_path)
    finally:
        fit.losses = trained.losses  # type: ignore[attr-defined]
    return trained.losses


def handlers() -> list[Any]:
    return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stops_after_the_step_and_resumes_as_if_nothing_had_been(
    tmp_path: Path, signum: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = handlers()
    whole = fit(tmp_path, Signal())
    capsys.readouterr()
    with pytest.raises(TrainingInterrupted) as caught:
        fit(tmp_path, Signal("on_train_batch_end", 2, signum))
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert (caught.value.code, caught.value.signum, caught.value.checkpoint) == (128 + signum, signum, path)
    assert capsys.readouterr().err == f"\n{signum.name}: stopped after step 2; resume from {path}\n"
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert fit.losses == whole[:2]  # type: ignore[attr-defined]
    assert handlers() == before
    assert fit(tmp_path, Signal(), ckpt_path=path) == whole[2:]


@pytest.mark.parametrize(
    ("hook", "step", "stopped", "kwargs"),
    [
        ("on_train_batch_end", 4, 5, {}),  # validation and the epoch's end are due
        ("on_train_batch_end", 2, 3, {"val_check_interval": 2}),  # validation is due in mid-epoch
        ("on_train_batch_end", 4, 5, {"limit_val_batches": 0}),  # the epoch's end alone
        ("on_validation_end", 4, 5, {}),
        ("on_train_epoch_start", 4, 5, {}),
        ("on_train_batch_end", 8, 8, {}),  # the last step: training is over, validated
        ("on_train_epoch_end", 8, 8, {}),
        ("on_train_batch_end", 6, 6, {"max_steps": 6, "max_epochs": None}),
    ],
)
def test_nothing_that_was_due_is_left_out(
    tmp_path: Path, hook: str, step: int, stopped: int, kwargs: dict[str, Any]
) -> None:
    plain = Signal()
    whole = fit(tmp_path, plain, **kwargs)
    first, second = Signal(hook, step, signal.SIGTERM), Signal()
    with pytest.raises(TrainingInterrupted) as caught:
        fit(tmp_path, first, **kwargs)
    path = caught.value.checkpoint
    assert torch.load(path, weights_only=True)["global_step"] == stopped
    losses = fit.losses + fit(tmp_path, second, ckpt_path=path, **kwargs)  # type: ignore[attr-defined]
    assert losses == whole
    assert first.seen + second.seen == plain.seen


def test_saves_at_once_where_it_has_to_wait(tmp_path: Path) -> None:
    """A long validation may outlast the patience of who sent the signal."""
    saved = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            saved.append((tmp_path / "checkpoints" / "last.ckpt").exists())

    with pytest.raises(TrainingInterrupted):
        fit(tmp_path, Signal("on_train_batch_end", 4, signal.SIGTERM), callbacks=[Look()])
    assert saved == [True]


def test_an_epoch_of_one_step_does_not_wait_for_ever(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted) as caught:
        fit(tmp_path, Signal("on_train_batch_end", 1, signal.SIGTERM), limit_train_batches=1, max_epochs=9)
    assert torch.load(caught.value.checkpoint, weights_only=True)["global_step"] == 2


def test_waits_for_the_end_of_an_accumulation_window(tmp_path: Path) -> None:
    kwargs = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    whole = fit(tmp_path, Signal(), **kwargs)
    with pytest.raises(TrainingInterrupted):
        fit(tmp_path, Signal("on_train_epoch_start", 0, signal.SIGTERM), **kwargs)
    assert fit.losses == whole[:2]  # type: ignore[attr-defined]
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert fit(tmp_path, Signal(), ckpt_path=path, **kwargs) == whole[2:]


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    """Lightning's own way with a KeyboardInterrupt: exit code 1, no checkpoint of ours."""
    before = handlers()
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, Signal("on_train_batch_end", 2, signal.SIGINT, signal.SIGINT))
    assert not isinstance(caught.value, TrainingInterrupted)
    assert not (tmp_path / "checkpoints").exists()
    assert handlers() == before


def test_runs_behind_lightning_s_checkpoint_callback(tmp_path: Path) -> None:
    """The checkpoint knows what ModelCheckpoint saved at the same step."""
    own = ModelCheckpoint(tmp_path / "own", every_n_train_steps=2)
    with pytest.raises(TrainingInterrupted) as caught:
        fit(
            tmp_path,
            Signal("on_train_batch_end", 2, signal.SIGTERM),
            callbacks=[own],
            enable_checkpointing=True,
        )
    states = torch.load(caught.value.checkpoint, weights_only=True)["callbacks"]
    (state,) = (state for name, state in states.items() if name.startswith("ModelCheckpoint"))
    assert state["best_model_path"] == own.best_model_path != ""


def test_folder_may_be_chosen_and_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "last.ckpt").write_bytes(b"older")
    stop = GracefulStop(folder=str(folder))
    trainer = quiet_trainer(tmp_path, callbacks=[stop, Signal("on_train_batch_end", 1, signal.SIGTERM)])
    with pytest.raises(TrainingInterrupted):
        trainer.fit(TextModule(), text_loader())
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 1


def test_without_a_signal_everything_is_left_as_it_was(tmp_path: Path) -> None:
    def mine(signum: int, frame: Any) -> None: ...

    during = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            during.append(handlers())

    old = signal.signal(signal.SIGTERM, mine)
    try:
        before = handlers()
        stop, look = GracefulStop(), Look()
        trainer = quiet_trainer(tmp_path, callbacks=[stop, look])
        trainer.fit(TextModule(), text_loader())
        assert handlers() == before
        assert before not in during
        assert trainer.callbacks.index(stop) < trainer.callbacks.index(look)
        assert not (tmp_path / "checkpoints").exists()
    finally:
        signal.signal(signal.SIGTERM, old)


def test_a_failing_run_gets_its_handlers_back(tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    before = handlers()
    with pytest.raises(ZeroDivisionError):
        quiet_trainer(tmp_path, callbacks=[GracefulStop(), Fail()]).fit(TextModule(), text_loader())
    assert handlers() == before


def test_a_fit_outside_of_the_main_thread_sets_no_handlers(tmp_path: Path) -> None:
    before, seen = handlers(), []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(handlers())

    trainer = quiet_trainer(tmp_path, callbacks=[GracefulStop(), Look()])
    thread = threading.Thread(target=trainer.fit, args=(TextModule(), text_loader()))
    thread.start()
    thread.join()
    assert trainer.global_step == 6
    assert seen == [before] * 6


def test_serves_the_other_namespace(tmp_path: Path) -> None:
    class Module(lp.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = torch.nn.functional.dropout(self.layer(batch["input_ids"][:, :2].float()), 0.5).mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Interrupt(lp.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    def fit_other(*callbacks: Any, ckpt_path: Path | None = None) -> list[float]:
        pl.seed_everything(1, verbose=False)
        trained = Module()
        trainer = quiet_trainer(tmp_path, namespace=lp, callbacks=[GracefulStop(), RandomState(), *callbacks])
        trainer.fit(trained, ResumableLoader(text_samples(32)), ckpt_path=ckpt_path)
        return trained.losses

    whole = fit_other()
    with pytest.raises(TrainingInterrupted) as caught:
        fit_other(Interrupt())
    assert fit_other(ckpt_path=caught.value.checkpoint) == whole[2:]


def test_lightning_s_seam_stands(tmp_path: Path) -> None:
    """What tells that work follows a batch; if Lightning moves it, this says so."""
    follows: list[bool] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            follows.append(_lightning.work_follows_batch(trainer))

    settings = {"max_epochs": 2, "max_steps": 7, "val_check_interval": 3, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(tmp_path, callbacks=[Look()], **settings)
    trainer.fit(module(), text_loader(text_samples(32)), text_loader(text_samples(8)))
    #                  validation, epoch's end          last step, validation
    assert follows == [False, False, True, True, False, False, True]


def test_pickles() -> None:
    assert pickle.loads(pickle.dumps(GracefulStop(folder="here"))).folder == "here"


SCRIPT = """
import sys, time
from pathlib import Path
import pytorch_lightning as pl, torch
from adaptrain import GracefulStop, RandomState
from tests.callbacks.test_random_state import ResumableLoader
from tests.toys import TextModule, quiet_trainer, text_samples, tiny_bert

folder = Path(sys.argv[1])
torch.set_num_threads(1)

class Note(pl.Callback):
    def on_train_batch_start(self, trainer, module, *_):
        (folder / "losses").write_text(" ".join(repr(loss) for loss in module.losses))
        time.sleep(0.1)

pl.seed_everything(1, verbose=False)
trainer = quiet_trainer(folder, max_epochs=2, callbacks=[Note(), GracefulStop(), RandomState()])
trainer.fit(TextModule(tiny_bert(dropout=0.2)), ResumableLoader(text_samples(160)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_signalled_exits_with_its_code_and_resumes(tmp_path: Path, signum: signal.Signals) -> None:
    def losses() -> list[float]:
        path = tmp_path / "losses"
        return [float(word) for word in path.read_text().split()] if path.exists() else []

    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environ, text=True, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 200
        while len(losses()) < 3 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert process.returncode == 128 + signum, err
    assert f"{signum.name}: stopped after step {len(losses())}; resume from {path}" in err
    assert "Traceback" not in err
    assert 3 <= len(losses()) < 40

    def train(ckpt_path: Path | None) -> list[float]:
        pl.seed_everything(1, verbose=False)
        trained = TextModule(tiny_bert(dropout=0.2))
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[RandomState()])
        trainer.fit(trained, ResumableLoader(text_samples(160)), ckpt_path=ckpt_path)
        return trained.losses

    assert losses() + train(path) == train(None)


@pytest.mark.slow
def test_all_ranks_stop_at_the_step_at_which_one_got_the_signal(tmp_path: Path) -> None:
    done = run_ranks(__name__, tmp_path)
    assert [rank.returncode for rank in done] == [128 + signal.SIGTERM] * 2, done
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [2, 2]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert "stopped after step 2" in done[0].stderr
    assert "stopped after step" not in done[1].stderr


def train_rank(folder: Path, rank: int) -> None:
    """Trains as one of two ranks, of which the second gets a signal, and writes at which step it stopped."""
    torch.set_num_threads(1)
    sender = Signal("on_train_batch_end", 2, *([signal.SIGTERM] if rank == 1 else []))
    trainer = quiet_trainer(folder, devices=2, strategy="ddp", max_epochs=9, callbacks=[GracefulStop(), sender])
    try:
        trainer.fit(TextModule(), text_loader())
    finally:
        (folder / f"{rank}.json").write_text(json.dumps(trainer.global_step))


if __name__ == "__main__":
    train_rank(Path(sys.argv[1]), int(os.environ["RANK"]))
