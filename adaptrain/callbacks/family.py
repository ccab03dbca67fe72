"""Keeps the model of each structural event, so that one pruned run leaves a family of models."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from adaptrain import _lightning
from adaptrain._lightning.structure import forget_compiled
from adaptrain.callbacks.after_training import attempt_together, validate_again
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.callbacks.family_recovery import check_recovery, describe_recovery, recover
from adaptrain.errors import ConfigurationError
from adaptrain.execution.oom import attempt
from adaptrain.family import samples
from adaptrain.family.about import describe, find_tokenizer, read_shapes, with_single
from adaptrain.family.metric import choose_metric, finite
from adaptrain.family.model_family import ModelFamily
from adaptrain.family.store import FOLDER, TOKENIZER, FamilyStore
from adaptrain.policies.learning_rate.build import metric_mode
from adaptrain.pruning import structure as structures
from adaptrain.pruning.cost import count_params
from adaptrain.pruning.elastic import cut_out
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import Match
from adaptrain.pruning.shape import typical_shape
from adaptrain.pruning.surgery import resize

_log = logging.getLogger(__name__)

_FINAL = "final"


class FamilyCheckpoint(AdaptiveCallback):
    """Keeps the model as it is right before each structural event, and the final one: the members of a `ModelFamily`.

    With `ProgressivePruning` those are the dense model, one after each event but the last, with all the training that
    it had until the next, and the final one. They lie in `family/` of the run's folder, each written at once and
    whole; tensors that several of them share are stored once. After training each is validated as the module
    validates itself, and measured: latency (the members taking turns), FLOPs and peak memory at each of the shapes,
    parameters and size. `adaptrain.ModelFamily.load(run_dir)` opens them. With `ElasticTraining` the networks that were
    trained inside of the final model are members, too.

    The trained module ends as it would without this callback, and `WallClock` does not count what comes after
    training. A run that was killed goes on with the members that its checkpoint knows of, and takes later ones again.

    Args:
        latency_input: The (batch, sequence) to measure at, or several by name; the first is what `select` goes by
            unless told otherwise. None: the loader's batch size and the median of padded lengths (`batch`). One alone
            is measured with a single sample as well (`single`).
        monitor: The validation metric that ranks the members; None: an accuracy or its like, else the perplexity, else
            the loss, whichever the module logs.
        mode: Whether a lower (`"min"`) or higher (`"max"`) `monitor` is better; `"auto"`: told by its name.
        recovery_steps: More optimizer steps for every member but the best, after training, with the module's own
            optimizer and a whole schedule of that length: members of early events have seen only part of training.
            What is no better is not kept; 0: none. In one process only.
        recovery_teacher: `"best"`: the best member teaches the others meanwhile (`Distillation`). None: they learn by
            the task alone, so that they err elsewhere than the best, which a cascade lives by.
        validation_samples: How many validation samples to keep with the family, tokens and labels, so that a cascade
            can be chosen on them later; of classifiers only, 0: none.
        folder: Where the members go; None: `family` in the run's folder.
        dry_run: Record what would be kept, and keep nothing.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is out of its range; or, before training, the trainer or the model cannot be
            served, or the model cannot read samples of the shapes.
    """

    def __init__(
        self,
        *,
        latency_input: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        monitor: str | None = None,
        mode: str = "auto",
        recovery_steps: int = 0,
        recovery_teacher: Literal["best"] | None = "best",
        validation_samples: int = 2000,
        folder: str | os.PathLike[str] | None = None,
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        self.latency_input = None if latency_input is None else read_shapes(latency_input)
        if monitor is not None and not (isinstance(monitor, str) and monitor):
            raise ConfigurationError(f"monitor must name a validation metric, such as val/accuracy, got {monitor!r}.")
        if mode not in ("auto", "min", "max"):
            raise ConfigurationError(f"mode must be 'auto', 'min' or 'max', got {mode!r}.")
        for argument, value in (("recovery_steps", recovery_steps), ("validation_samples", validation_samples)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"{argument} must be a whole number of at least 0, got {value!r}.")
        if recovery_teacher not in ("best", None):
            raise ConfigurationError(f"recovery_teacher must be 'best' or None, got {recovery_teacher!r}.")
        self.recovery_steps = recovery_steps
        self.recovery_teacher = recovery_teacher
        self.validation_samples = validation_samples
        self.monitor = monitor
        self.mode = metric_mode(monitor, callback="FamilyCheckpoint") if monitor and mode == "auto" else mode
        self.folder = folder
        self._reset()

    def _reset(self) -> None:
        self._match: Match | None = None
        self._store: FamilyStore | None = None
        self._names: list[str] = []  # of the members so far

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Moves behind the other callbacks: members are measured once the trainer is as it was found."""
        if stage == "fit":
            self._reset()
            self.on_exit(_lightning.run_last(trainer, self))
        super().setup(trainer, pl_module, stage)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses, before training, what cannot be kept or measured."""
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)
        self._match = find_family(pl_module)
        for shape in (self.latency_input or {}).values():
            self._match.example_inputs(*shape)
        if self.recovery_steps:
            check_recovery(trainer, pl_module, taught=self.recovery_teacher is not None)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the family's folder, or goes on with that of the run that is resumed."""
        self._open(trainer, pl_module)

    def _open(self, trainer: Any, pl_module: Any) -> None:
        assert self._match is not None
        shapes = self.latency_input or with_single(typical_shape(trainer.train_dataloader))
        store = FamilyStore(self.folder or _lightning.run_folder(trainer) / FOLDER)
        if self.dry_run:
            return
        self._store = store
        if not _lightning.is_rank_zero(trainer):
            return
        if _lightning.resume_step(trainer) is None:
            store.begin()
            about = describe(self._match, shapes, data=trainer.datamodule, device=trainer.strategy.root_device)
            store.write_about(about | {"metric": self.monitor, "mode": self.mode})
            tokenizer = find_tokenizer(trainer.datamodule, pl_module)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(store.folder / TOKENIZER))
        else:
            store.about()  # refuses a folder that is gone
            store.keep(self._names)

    def on_before_change(self, trainer: Any, pl_module: Any, knob: str, *, at_end: bool = False) -> None:
        """Keeps the model while it is as it was trained."""
        if knob == "structure" and self._match is not None:
            pruned = sum(name != "dense" for name in self._names)
            is_dense = structures.current(self._match) == structures.dense(self._match)
            self._keep(trainer, "dense" if is_dense else f"pruned-{pruned + 1}")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """After fit, keeps the final model and measures all members; the others have left the trainer by then."""
        if stage == "fit" and self._match is not None:
            if self._store is None:  # resumed where nothing was left to train
                self._open(trainer, pl_module)
            self._keep(trainer, _FINAL)
            for other in trainer.callbacks:  # networks that were trained inside of the final one
                for name, structure in getattr(other, "family_structures", list)():
                    self._keep(trainer, name, structure)
            if self._store is not None:
                self._judge(trainer, pl_module, self._store)
                if _lightning.is_rank_zero(trainer):
                    self._measure(trainer, self._store)
                    self._keep_samples(trainer, self._store)
        super().teardown(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """Returns the names of the members so far."""
        return {"members": self._names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with them."""
        self._names = list(state_dict["members"])

    def _keep(self, trainer: Any, name: str, structure: structures.Structure | None = None) -> None:
        """Keeps the model as a member, or the units of a structure alone."""
        assert self._match is not None
        before, step = len(self._names), int(trainer.global_step)
        match = self._match if structure is None else cut_out(self._match, structure)
        if self._store is not None and _lightning.is_rank_zero(trainer):
            self._store.add(match, name=name, step=step, inside=None if structure is None else _FINAL)
        self._names = [*(other for other in self._names if other != name), name]
        self.record(
            trainer,
            "family",
            old=before,
            new=len(self._names),
            reason=f"the model of step {step} is kept as member {name!r}",
            readings={"params": count_params(match.model)},
            offer=False,
        )

    def _judge(self, trainer: Any, pl_module: Any, store: FamilyStore) -> None:
        """Validates and recovers the members, where there is memory for it."""
        members = _lightning.broadcast(trainer, store.members() if _lightning.is_rank_zero(trainer) else None)
        # It is rebuilt, and the live model takes its place while its own weights wait.
        needed = 2 * max(member["size_bytes"] for member in members)
        _, lack = attempt_together(
            lambda: self._validate(trainer, pl_module, store, members), pl_module, host_bytes=needed
        )
        if lack is not None:
            _log.warning(
                "There is no memory to validate all members of the family (%s), so not all are ranked. To do what is"
                " left, fit again from the last checkpoint.",
                lack,
            )

    def _validate(self, trainer: Any, pl_module: Any, store: FamilyStore, members: list[dict[str, Any]]) -> None:
        """Validates every member that was not yet, and recovers them, in the live module, which ends as it was."""
        with self._put_back(pl_module):
            for member in members:
                if member["metrics"]:
                    continue
                self._become(pl_module, store, member)
                logged = _lightning.broadcast(trainer, validate_again(trainer, pl_module))
                if not logged:
                    _log.warning("The module logs no validation metric, so the members of its family are not ranked.")
                    break
                metrics = finite(logged)
                if lost := sorted(set(logged) - set(metrics)):
                    _log.warning("Member %r has diverged: its %s is no number.", member["name"], " and ".join(lost))
                member["metrics"] = metrics
                if _lightning.is_rank_zero(trainer):
                    store.update(member["name"], metrics=metrics)
            if _lightning.is_rank_zero(trainer):
                self._note_metric(store)
            if self.recovery_steps:
                recover(
                    trainer,
                    pl_module,
                    store,
                    steps=self.recovery_steps,
                    become=lambda member: self._become(pl_module, store, member),
                    teacher=None
                    if self.recovery_teacher is None
                    else lambda member: store.rebuild(member, build=self._build(member)),
                )
        for member in store.members() if self.recovery_steps else []:
            if "recovery" in member:
                old, new, reason = describe_recovery(member, store.about()["metric"])
                self.record(trainer, "recovery", old=old, new=new, reason=reason, offer=False)

    def _note_metric(self, store: FamilyStore) -> None:
        """Settles which metric ranks the members."""
        about = store.about()
        metrics = {name: value for member in store.members() for name, value in member["metrics"].items()}
        if self.monitor is not None:
            if metrics and self.monitor not in metrics:
                _log.warning(
                    "FamilyCheckpoint: monitor=%s is not logged by validation; there are: %s. The members are not"
                    " ranked.",
                    self.monitor,
                    ", ".join(sorted(metrics)),
                )
            return
        chosen = choose_metric(metrics)
        if chosen is not None:
            store.write_about(about | {"metric": chosen[0], "mode": chosen[1]})

    def _measure(self, trainer: Any, store: FamilyStore) -> None:
        """Measures all members side by side, where one has not been measured here."""
        known, device = store.members(), trainer.strategy.root_device

        def measure() -> None:
            family = ModelFamily(store, device=device, build=self._build(known[0]))
            for batch, length in family.shapes.values():
                family.measure(batch_size=batch, sequence_length=length)

        copies = sum(member["size_bytes"] for member in known) if device.type == "cpu" else 0
        _, lack = attempt(measure, host_bytes=copies)
        if lack is not None:
            _log.warning(
                "There is no memory to measure the members of the family side by side (%s): ModelFamily does so when it"
                " is asked.",
                lack,
            )

    def _keep_samples(self, trainer: Any, store: FamilyStore) -> None:
        loaders = trainer.val_dataloaders
        loader = loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders
        if not self.validation_samples or loader is None or store.about()["task"] == "language_model":
            return
        found = samples.gather(loader, self.validation_samples)
        if found is not None:
            samples.save(found, store.folder)

    def _become(self, pl_module: Any, store: FamilyStore, member: Mapping[str, Any]) -> None:
        """Gives the live model a member's structure and weights."""
        assert self._match is not None
        weights = store.rebuild(member, build=self._build(member)).state_dict()
        _reshape(self._match, pl_module, member["structure"]["layers"], weights)

    def _build(self, member: Mapping[str, Any]) -> Callable[[], Any] | None:
        """Builds the dense model, where the member does not say how."""
        assert self._match is not None
        return None if member["config"] is not None else self._match.dense_twin

    @contextlib.contextmanager
    def _put_back(self, pl_module: Any) -> Iterator[None]:
        """Puts structure and weights back as they are now."""
        assert self._match is not None
        structure = structures.current(self._match)
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self._match.model.state_dict().items()}
        modes = {module: module.training for module in pl_module.modules()}
        try:
            yield
        finally:
            _reshape(self._match, pl_module, structure, weights)
            for module, mode in modes.items():
                module.training = mode


def _reshape(match: Match, pl_module: Any, structure: structures.Structure, weights: Mapping[str, Any]) -> None:
    if structures.current(match) != structure:
        resize(match, structures.copy_of(structure))
        forget_compiled(pl_module)
    match.model.load_state_dict(weights)
