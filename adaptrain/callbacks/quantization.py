"""Leaves, beside the trained model, a copy of it in lower precision."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptrain import _lightning
from adaptrain._lightning.structure import before_hook, forget_compiled
from adaptrain.callbacks.after_training import attempt_together, validate_again
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.compression.ao import check_installed
from adaptrain.compression.aware import AWARE_METHODS, train_rounded
from adaptrain.compression.quantization import (
    ALL_METHODS,
    METHODS,
    Quantized,
    Trial,
    check_candidates,
    quantize,
    save_quantized,
)
from adaptrain.errors import ConfigurationError
from adaptrain.execution.oom import weights_on_host
from adaptrain.family.about import find_tokenizer
from adaptrain.family.metric import choose_metric
from adaptrain.policies.learning_rate.build import metric_mode
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import Match
from adaptrain.pruning.shape import read_shape, typical_shape

_log = logging.getLogger(__name__)

FOLDER = "quantized"


class Quantization(AdaptiveCallback):
    """Holds the model in lower precision once it is trained, by what that is measured to cost and to lose.

    After fit, and after the structure was cut where `ProgressivePruning` is on, copies of the model in lower precision
    are timed on the training device beside it, and validated as the module validates itself. The best of those that
    lose little enough is written to `quantized/` in the run's folder, where `adaptrain.compression.load_quantized`
    reads it; without memory for that there is none, as a warning says. The trained module stays in full precision. See
    `adaptrain.compression.quantize` for what the methods buy.

    With `aware_from` the last part of training is quantization-aware: the model computes with weights rounded as they
    will be held, in validation too, so that what rounding costs can be trained away (`adaptrain.compression.aware`).
    It is worth it only where rounding costs something; try without it first.

    Args:
        method: `"auto"`, which tries `candidates`, or one of `"bf16"`, `"int8_dynamic"`, `"int8_weight"`,
            `"int4_weight"`, and by torchao `"torchao_int8_dynamic"`, `"torchao_int8_weight"`.
        candidates: What `"auto"` tries; torchao's methods only where they are named.
        aware_from: The share of training, in [0, 1), from which on it is quantization-aware; it needs a `method` in 8
            or 4 bits. None: the model is rounded after training only.
        max_metric_drop: How much worse than in full precision the metric may be, in its own units.
        minimize: What is best among those that lose no more: `"latency"` or `"size"`.
        monitor: The validation metric; None: an accuracy or its like, else the perplexity, else what was logged first.
        latency_input: The (batch, sequence) to measure at. None: the loader's batch size and the median of the padded
            lengths.
        dry_run: Measure and record, write nothing.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is out of its range; or, before training, the model is of no known family, or is
            the LightningModule itself, or the method does not run on the device.
    """

    def __init__(
        self,
        *,
        method: str = "auto",
        candidates: Sequence[str] = METHODS,
        aware_from: float | None = None,
        max_metric_drop: float = 0.01,
        minimize: Literal["latency", "size"] = "latency",
        monitor: str | None = None,
        latency_input: Sequence[int] | None = None,
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        if method not in (*ALL_METHODS[1:], "auto"):
            raise ConfigurationError(f"method must be one of auto, {', '.join(ALL_METHODS[1:])}, got {method!r}.")
        check_installed(method)
        check_candidates(candidates)
        if aware_from is not None:
            _check_aware(aware_from, method)
        if isinstance(max_metric_drop, bool) or not isinstance(max_metric_drop, (int, float)) or max_metric_drop < 0:
            raise ConfigurationError(f"max_metric_drop must be a number of at least 0, got {max_metric_drop!r}.")
        if minimize not in ("latency", "size"):
            raise ConfigurationError(f"minimize must be latency or size, got {minimize!r}.")
        if monitor is not None:
            metric_mode(monitor, callback=type(self).__name__)  # refuses a name that does not tell which way is better
        self.method = method
        self.candidates = tuple(candidates)
        self.aware_from = aware_from
        self.max_metric_drop = max_metric_drop
        self.minimize: Literal["latency", "size"] = minimize
        self.monitor = monitor
        self.latency_input = None if latency_input is None else read_shape(latency_input)
        self._reset()

    def _reset(self) -> None:
        self._match: Match | None = None
        self._trials: tuple[Trial, ...] = ()
        self._shape: tuple[int, int] | None = None
        self._aware = False  # also in a dry run, which would be

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Moves behind the other callbacks: the model is measured once the trainer is as it was found."""
        if stage == "fit":
            self._reset()
            self.on_exit(_lightning.run_last(trainer, self))
        super().setup(trainer, pl_module, stage)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses, before training, what cannot be quantized and validated."""
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)
        self._match = find_family(pl_module)
        if self._match.model is pl_module:
            raise ConfigurationError(
                f"{type(pl_module).__name__} is the model and the LightningModule in one, so that no other model can be"
                " validated in its place. Hold the model as an attribute."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds the shape to measure at; refuses a method that does not run here, and a run of unknown length.

        The latter where rounded weights begin along it.
        """
        if self.aware_from is not None:
            _lightning.refuse_endless(trainer, user=type(self).__name__)
        if self.method != "auto":
            _try_out(self.method, next(pl_module.parameters()))
        self._shape = self.latency_input or typical_shape(trainer.train_dataloader)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begins with rounded weights where that is due; a resumed run does so where it was."""
        if self.aware_from is None or self._aware or _lightning.progress(trainer) < self.aware_from - 1e-9:
            return
        assert self._match is not None
        self._aware = True
        if not self.dry_run:
            stop = train_rounded(self._match.model, self.method)
            forget_compiled(pl_module)

            def end() -> None:
                stop()
                forget_compiled(pl_module)

            self.on_exit(end)  # where training fails; else before others measure the model at its end
            self.on_exit(before_hook(trainer.fit_loop, "on_run_end", end))
        self.record(
            trainer,
            "fake_quantization",
            old="none",
            new=self.method,
            reason=f"{_lightning.progress(trainer):.0%} of training are over: the model computes with rounded weights",
        )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """After fit, makes the copy; the other callbacks have left the trainer by then."""
        if stage == "fit" and self._match is not None:
            self._quantize(trainer, pl_module, self._match)
        super().teardown(trainer, pl_module, stage)

    def report(self) -> list[dict[str, Any]]:
        """Returns what was tried, after fit: `method`, `latency_ms`, `size_bytes`, `metric`, and why it was refused."""
        return [dict(vars(trial)) for trial in self._trials]

    def _quantize(self, trainer: Any, pl_module: Any, match: Match) -> None:
        shape = self._shape or self.latency_input or typical_shape(trainer.train_dataloader)
        first = validate_again(trainer, pl_module)
        chosen = (self.monitor, metric_mode(self.monitor)) if self.monitor else choose_metric(first)
        if chosen is not None and chosen[0] not in first:
            chosen = None
        if chosen is None:
            _log.warning(
                "Validation logs no metric%s, so lower precision is chosen by cost alone.",
                f" {self.monitor!r}" if self.monitor else "",
            )

        def metric_of(model: Any) -> float:
            assert chosen is not None
            with _in_place_of(match.model, model, pl_module):
                return validate_again(trainer, pl_module)[chosen[0]]

        def choose() -> Quantized:
            return quantize(
                match.model,
                self.method,
                example_inputs=match.example_inputs(*shape),
                evaluate=metric_of if chosen else None,
                mode=chosen[1] if chosen else "max",
                max_metric_drop=self.max_metric_drop,
                minimize=self.minimize,
                candidates=self.candidates,
            )

        # A copy as it is, and one more that is rounded or timed.
        quantized, lack = attempt_together(choose, pl_module, host_bytes=2 * weights_on_host(match.model))
        if quantized is None:
            _log.warning(
                "There is no memory to hold and measure the model in lower precision (%s), so there is no such copy."
                " adaptrain.compression.quantize makes one of a trained model.",
                lack,
            )
            return
        # Ranks measure other times, and one of them decides; each has built the same models.
        method, trials = _lightning.broadcast(trainer, (quantized.method, [vars(t) for t in quantized.trials]))
        self._trials = tuple(Trial(**trial) for trial in trials)
        _log.info("Lower precision:\n%s", Quantized(None, method, self._trials).table())
        folder = _lightning.run_folder(trainer) / FOLDER
        if _lightning.is_rank_zero(trainer) and not self.dry_run:
            save_quantized(quantized, folder, tokenizer=find_tokenizer(trainer.datamodule, pl_module))
        self._record(trainer, method, shape, chosen[0] if chosen else None)

    def _record(self, trainer: Any, method: str, shape: tuple[int, int], metric: str | None) -> None:
        tried = {trial.method: trial for trial in self._trials}
        first: Any = tried["none"]  # both are measured, so that nothing of them is None
        best: Any = tried[method]
        reason = (
            f"{best.latency_ms / first.latency_ms:.2f} of the time at {shape[0]} x {shape[1]} tokens and"
            f" {best.size_bytes / first.size_bytes:.2f} of the size of full precision"
        )
        if metric is not None:
            reason += f", {metric} {first.metric:.4g} → {best.metric:.4g}"
        if method == "none":
            better = "faster" if self.minimize == "latency" else "smaller"
            reason = f"no lower precision is {better} here and loses little enough"
        self.record(
            trainer,
            "precision",
            old=str(next(trainer.lightning_module.parameters()).dtype).removeprefix("torch."),
            new=method,
            reason=reason,
            readings={trial.method: trial.latency_ms for trial in self._trials},
            offer=False,
        )


def _try_out(method: str, like: Tensor) -> None:
    """Refuses a method that does not run on a device, as two small layers tell that are rounded there.

    Raises:
        ConfigurationError: It does not.
    """
    with torch.random.fork_rng(devices=[]):
        layers = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64)).to(like.device, like.dtype)
    quantize(layers, method, example_inputs={"input": torch.zeros(1, 4, dtype=torch.long, device=like.device)})


def _check_aware(aware_from: Any, method: str) -> None:
    if isinstance(aware_from, bool) or not isinstance(aware_from, (int, float)) or not 0 <= aware_from < 1:
        raise ConfigurationError(f"aware_from must be a share of training in [0, 1), got {aware_from!r}.")
    if method not in AWARE_METHODS:
        raise ConfigurationError(
            f"aware_from={aware_from:g} needs to know how weights will be held: method must be one of"
            f" {', '.join(AWARE_METHODS)}, got {method!r}."
        )


@contextmanager
def _in_place_of(model: Any, other: Any, pl_module: Any) -> Iterator[None]:
    """Puts another model where the module holds its own."""
    places = [
        (parent, name) for parent in pl_module.modules() for name, child in parent.named_children() if child is model
    ]
    try:
        for parent, name in places:
            setattr(parent, name, other)
        yield
    finally:
        for parent, name in places:
            setattr(parent, name, model)
