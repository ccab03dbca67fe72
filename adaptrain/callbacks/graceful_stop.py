"""Ctrl-C and SIGTERM end training with a checkpoint that resumes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaptrain import _lightning

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(SystemExit):
    """Training was ended by a signal, after a checkpoint. The exit code is 128 + the signal's number.

    Args:
        checkpoint: The checkpoint to resume from.
        signum: The signal.
    """

    def __init__(self, checkpoint: Path, signum: int) -> None:
        super().__init__(128 + signum)
        self.checkpoint = checkpoint
        self.signum = signal.Signals(signum)


class GracefulStop(_lightning.Callback):
    """On SIGINT or SIGTERM, finishes the optimizer step, saves `last.ckpt` and raises `TrainingInterrupted`.

    The checkpoint holds what every other callback did at that step. Where validation or the end of an epoch is due
    right after the step, a resumed run would leave it out: the checkpoint is saved at once all the same, training
    goes on to the next step's end, and the checkpoint is saved anew there. A second signal has its default effect at
    once.

    All ranks stop at the same step, whichever of them got the signal. Handlers are set in the main thread only; a fit
    in another thread keeps the signals' present effect. They take the place of Lightning's own while training runs,
    that for SIGTERM under SLURM's auto-requeue included.

    Args:
        folder: Where `last.ckpt` goes; None: `checkpoints` in the run's folder.
    """

    def __init__(self, *, folder: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.folder = folder
        self._path = Path()
        self._signum = 0  # as received by this process
        self._agreed = 0  # as known to all ranks
        self._waited = False
        self._stopping = False
        self._previous: dict[int, Any] = {}
        self._undo: Callable[[], None] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Moves behind the other callbacks."""
        if stage == "fit":
            self._undo = _lightning.run_last(trainer, self)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Settles where the checkpoint goes."""
        run_folder = _lightning.run_folder(trainer)
        self._path = (run_folder / "checkpoints" if self.folder is None else Path(self.folder)) / "last.ckpt"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Sets the handlers; not earlier, as Lightning sets its own after `on_fit_start`."""
        self._signum = signal.SIGTERM if trainer.received_sigterm else 0
        self._agreed = 0
        self._waited = False
        self._stopping = False
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._on_signal) for signum in _SIGNALS}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves the checkpoint if a signal came; behind every other callback."""
        if not _lightning.at_step_boundary(trainer) or not self._agree(trainer):
            return
        self._save(trainer)
        wait = not self._waited and _lightning.work_follows_batch(trainer)
        # By the clock, validation can be due on one rank and not on another.
        self._waited = bool(_max_over_ranks(trainer, wait))
        self._stopping = not self._waited

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Stops here, and not where it saved: the module's own hook and the step's metrics come after that."""
        if self._stopping:
            self._stop(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stops here if the signal waited for what was due after the last batch, or came in it."""
        if self._agree(trainer):
            self._save(trainer)
            self._stop(trainer)
        self._restore_handlers()  # before Lightning puts back those it found

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves the trainer as it was found."""
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leaves the trainer and the handlers as they were found."""
        self._restore_handlers()
        self._leave()

    def _on_signal(self, signum: int, frame: Any) -> None:
        if not self._signum:
            self._signum = signum
            return
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        signal.raise_signal(signum)

    def _agree(self, trainer: Any) -> bool:
        if not self._agreed:
            self._agreed = _max_over_ranks(trainer, self._signum)
        return self._agreed != 0

    def _save(self, trainer: Any) -> None:
        partial = self._path.with_name("last.ckpt.partial")
        trainer.save_checkpoint(partial)
        if _lightning.is_rank_zero(trainer):
            partial.replace(self._path)
        trainer.strategy.barrier("adaptrain.GracefulStop")

    def _stop(self, trainer: Any) -> None:
        interrupted = TrainingInterrupted(self._path, self._agreed)
        if _lightning.is_rank_zero(trainer):
            sys.stderr.write(
                f"\n{interrupted.signum.name}: stopped after step {trainer.global_step}; resume from {self._path}\n"
            )
        raise interrupted

    def _restore_handlers(self) -> None:
        for signum, handler in self._previous.items():
            if signal.getsignal(signum) == self._on_signal:  # else another has taken it over since
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def _leave(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None


def _max_over_ranks(trainer: Any, value: int) -> int:
    return int(_lightning.all_reduce([float(value)], op="max", device=trainer.strategy.root_device)[0])
