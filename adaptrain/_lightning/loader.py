"""The loader seam: the training loader's batch size, changed in the middle of an epoch.

Lightning sets up its training loader once and counts its batches once: in `fit_loop.max_batches`, the combined loader's
`limits`, the fetcher's `length`, `trainer.val_check_batch` and the progress bar. `ResizableLoader` puts a loader with a
resizable batch sampler in its place, after Lightning has put in its distributed sampler, and keeps these counts true.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from adaptrain._lightning.replaced_loader import loader_batch_size, replaced_loader
from adaptrain.errors import ConfigurationError
from adaptrain.execution.sampler import ResizableBatchSampler

_SEAMS: WeakKeyDictionary[Any, ResizableLoader] = WeakKeyDictionary()


def share_of_data(trainer: Any) -> float | None:
    """The share of the run that is spent, in [0, 1], by samples; None where no batch size may change.

    Steps cannot tell it: how many there will be depends on batch sizes that are not known yet.
    """
    seam = _SEAMS.get(trainer)
    return None if seam is None else seam.share()


class ResizableLoader:
    """The batch size of a trainer's training loader.

    Args:
        trainer: The trainer, in `setup`: `configure_optimizers` may already ask for the number of batches.
        first: Given the loader's batch size, returns the samples per batch on this rank to begin with.
        gather: Returns every rank's value; a collective.
        callback: The callback's class name, for messages.
    """

    def __init__(
        self, trainer: Any, *, first: Callable[[int], int], gather: Callable[[Any], list[Any]], callback: str
    ) -> None:
        self._trainer = trainer
        self._fit_loop = trainer.fit_loop
        self._first = first
        self._gather = gather
        self._callback = callback
        self._setting_up: list[Any] | None = None  # the training loaders, while Lightning sets them up
        self._sampler: ResizableBatchSampler | None = None
        self._validations = 0  # of this epoch, with one that follows the batch just done
        self._is_due = False  # one follows the batch just done
        self.loaders_size = 0

    # In and out ---------------------------------------------------------------------------------------------------

    def install(self) -> Callable[[], None]:
        """Wraps Lightning's setting up of training data.

        Returns:
            What takes the wraps off.

        Raises:
            RuntimeError: Lightning has moved the seam.
        """
        fit_loop, strategy = self._fit_loop, self._trainer.strategy
        names = ("setup_data", "_load_combined_loader_states", "epoch_progress", "max_batches")
        if not all(hasattr(fit_loop, name) for name in names) or not hasattr(strategy, "process_dataloader"):
            raise RuntimeError("This version of Lightning has no fit_loop.setup_data or strategy.process_dataloader.")
        setup_data, process_dataloader = fit_loop.setup_data, strategy.process_dataloader

        def resizable_setup_data() -> None:
            self._setting_up = []
            try:
                setup_data()
            finally:
                self._setting_up = None
            self._follow_epoch()

        def resizable_process_dataloader(loader: object) -> object:
            loader = process_dataloader(loader)
            return loader if self._setting_up is None else self._replace(loader)

        wraps = (
            (fit_loop, "setup_data", resizable_setup_data),
            (strategy, "process_dataloader", resizable_process_dataloader),
        )
        for owner, name, wrap in wraps:
            setattr(owner, name, wrap)
        _SEAMS[self._trainer] = self

        def undo() -> None:
            for owner, name, wrap in wraps:
                if vars(owner).get(name) is wrap:  # else another has wrapped it since, around ours
                    delattr(owner, name)
            _SEAMS.pop(self._trainer, None)

        return undo

    def _replace(self, loader: Any) -> Any:
        assert self._setting_up is not None
        self._setting_up.append(loader)
        if len(self._setting_up) > 1:
            raise ConfigurationError(
                f"{self._callback}: global_batch_size serves one training loader, not several at once. Give one, or"
                " leave global_batch_size=None."
            )
        self.loaders_size = loader_batch_size(loader, callback=self._callback)
        if "dataloader_iter" in inspect.signature(self._trainer.lightning_module.training_step).parameters:
            raise ConfigurationError(
                f"{self._callback}: global_batch_size does not serve training_step(dataloader_iter), which takes"
                " batches by itself. Take the batch as argument, or leave global_batch_size=None."
            )
        size = self._first(self.loaders_size) if self._sampler is None else self._sampler.batch_size
        generators = {id(g): g for g in (loader.generator, getattr(loader.sampler, "generator", None)) if g is not None}
        sampler = ResizableBatchSampler(loader.sampler, size, loader.drop_last, generators=list(generators.values()))
        sampler.start(self._fit_loop.epoch_progress.current.processed)
        self._sampler = sampler
        return replaced_loader(loader, sampler, self)

    # Sizes --------------------------------------------------------------------------------------------------------

    @property
    def sampler(self) -> ResizableBatchSampler:
        """The resizable sampler, once training data is set up."""
        assert self._sampler is not None, "training data is not set up yet"
        return self._sampler

    @property
    def trained(self) -> int:
        """Batches of this epoch that were trained on."""
        # Lightning's counter begins anew only with the epoch's first batch.
        return min(int(self._fit_loop.epoch_loop.batch_progress.current.processed), self.sampler.handed_out)

    def resize(self, size: int) -> int | None:
        """Changes the samples per batch, from the next batch that no worker has taken yet.

        Call it on every rank, where the optimizer has just stepped. A change begins with an accumulation window, and
        never makes the batch just trained on the last one: Lightning has already treated it as one among others.

        Args:
            size: Samples per batch on this rank.

        Returns:
            The batches of this epoch before the first of the new size; None where it must wait for the next epoch.
        """
        trainer, trained = self._trainer, self.trained
        every = int(trainer.accumulate_grad_batches)
        with self.sampler.trying():
            self.sampler.resize(size, every=every)
            ends_here = self._batches() <= trained or self._fit_loop.epoch_loop.batch_progress.is_last_batch
        if any(self._gather(bool(ends_here))):
            return None
        if not self.sampler.is_mixed and trainer.val_check_batch:
            self._validations, left = divmod(trained, trainer.val_check_batch)
            self._is_due = not left
        start = self.sampler.resize(size, every=every)
        self.refresh()
        return start

    def _follow_epoch(self) -> None:
        """After `setup_data`, which Lightning calls at the beginning of a run and of each epoch."""
        if self._sampler is None or self._fit_loop._combined_loader is None:
            return
        # Lightning restores a loader only in the middle of an epoch (between epochs a generator is to go on as well),
        # and only where nothing has asked for the number of batches before the loops were restored.
        if states := self._fit_loop._combined_loader_states_to_load:
            self._fit_loop._combined_loader._load_state_dicts(states)
            self._fit_loop._combined_loader_states_to_load = []
        epoch = self._fit_loop.epoch_progress.current.processed
        if self._sampler.epoch != epoch:
            self._sampler.start(epoch)
            self._validations = 0
        self._is_due = False
        self.refresh()

    # Lightning's counts -------------------------------------------------------------------------------------------

    def _batches(self) -> int:
        """The batches of this epoch under `limit_train_batches`: a whole number of them, or a share of the samples."""
        limit = self._trainer.limit_train_batches
        total = len(self.sampler)
        if isinstance(limit, int):
            return min(total, limit)
        if self.sampler.is_mixed and limit < 1.0:
            return min(total, max(1, self.sampler.batches_within(limit * self.sampler.samples)))
        return min(total, max(1, int(total * limit)))

    def refresh(self) -> None:
        """Tells Lightning how many batches this epoch has, and with which of them validation is due next."""
        fit_loop, trainer = self._fit_loop, self._trainer
        combined, batches = fit_loop._combined_loader, self._batches()
        combined.limits = [batches]
        if combined._iterator is not None:
            combined._iterator.limits = [batches]
        fit_loop._data_fetcher.length = fit_loop.max_batches = batches
        _show_total(trainer, batches)
        interval = trainer.val_check_interval
        if trainer.val_check_batch is None:  # by time
            return
        if isinstance(interval, int):
            trainer.val_check_batch = interval if trainer.check_val_every_n_epoch is None else min(interval, batches)
        elif not self.sampler.is_mixed:
            trainer.val_check_batch = max(1, int(batches * interval))
        elif not self._is_due:
            trainer.val_check_batch = self._next_validation(interval, batches)
            self._is_due = trainer.val_check_batch == self.trained
            self._validations += self._is_due

    def _next_validation(self, interval: float, batches: int) -> int:
        """Returns the batch with which the next of the epoch's 1/interval validations comes, by samples."""
        limit = self._trainer.limit_train_batches
        samples = self.sampler.samples * (1.0 if isinstance(limit, int) else limit)
        share = (self._validations + 1) * interval
        if share > 1 + 1e-9:
            return batches + 1  # none is left: no batch number is a multiple of it
        within = batches if share > 1 - 1e-9 else self.sampler.batches_within(share * samples)
        return min(batches, max(self.trained, within, 1))

    def batch_done(self) -> None:
        """Call it at the end of each batch: finds the next validation where batches differ in size."""
        if not self.sampler.is_mixed or isinstance(self._trainer.val_check_interval, int):
            return
        self._is_due = False
        self.refresh()

    # The run ------------------------------------------------------------------------------------------------------

    def share(self) -> float:
        """The share of the run that is spent: of the epochs by samples, or of `max_steps`, whichever is more."""
        trainer, shares = self._trainer, [0.0]
        if trainer.max_steps not in (None, -1):
            shares.append(trainer.global_step / trainer.max_steps)
        if self._sampler is not None and trainer.max_epochs not in (None, -1):
            limit = trainer.limit_train_batches
            if isinstance(limit, int) and limit < len(self._sampler):
                spent = self.trained / limit
            else:
                part = self._sampler.samples * (1.0 if isinstance(limit, int) else limit)
                done = self.trained >= self._batches()
                spent = 1.0 if done else self._sampler.position(self.trained) / max(1.0, part)
            shares.append((self._sampler.epoch + min(1.0, spent)) / max(1, trainer.max_epochs))
        return min(1.0, max(shares))

    # A checkpoint -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns where in its epoch each rank's order is. A collective: Lightning calls it on every rank."""
        ranks = self._gather(self.sampler.state_dict(self.trained))
        return {"ranks": ranks, "validations": self._validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on there.

        Raises:
            ConfigurationError: The checkpoint is of a run without a resizable loader, or with other processes.
        """
        ranks = state.get("ranks")
        if ranks is None:
            raise ConfigurationError(
                "The checkpoint was written in a run without global_batch_size, by a loader that kept its own place in"
                " the epoch. Resume with global_batch_size=None, or begin anew."
            )
        if len(ranks) != self._trainer.world_size:
            raise ConfigurationError(
                f"The checkpoint was written by {len(ranks)} processes and is resumed by {self._trainer.world_size}:"
                " each has another part of the data then. Resume with as many, or with global_batch_size=None."
            )
        self._validations = int(state["validations"])
        self.sampler.load_state_dict(ranks[self._trainer.global_rank])


def _show_total(trainer: Any, batches: int) -> None:
    """Progress bars ask for an epoch's batches when it begins."""
    bar = trainer.progress_bar_callback
    tqdm = getattr(bar, "_train_progress_bar", None)
    if tqdm is not None:
        tqdm.total = batches
    rich, task = getattr(bar, "progress", None), getattr(bar, "train_progress_bar_id", None)
    if rich is not None and task is not None:
        rich.update(task, total=batches)
