"""Ends training with an average of its best checkpoints, where that is better."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptrain import _lightning
from adaptrain.callbacks.after_training import validate_again
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.decisions import Decision
from adaptrain.errors import ConfigurationError
from adaptrain.family.metric import choose_metric, is_better
from adaptrain.fusion import merge
from adaptrain.policies.learning_rate.build import metric_mode

_log = logging.getLogger(__name__)

FOLDER = "soup"
_METHODS = ("greedy_soup", "uniform_soup")
_OTHER_UNITS = ("structure", "weight_sparsity", "elastic")  # knobs after which older weights are of another model
_MUST_FOLLOW = ("FamilyCheckpoint", "Quantization")  # work on the final weights as well


class WeightSoup(AdaptiveCallback):
    """Keeps the best checkpoints of a run and ends it with their average, if that validates better than the last one.

    After each validation from `begin` on, the weights are kept in `soup/` of the run's folder if they are among the
    `keep` best. After fit the kept ones and the final one are averaged as `adaptrain.fusion.merge` does (Wortsman et
    al. 2022, arXiv:2203.05482), the average is validated as the module validates itself, and takes the place of the
    final weights if it is better by the metric. Weights from before a change of the structure are of another model, and
    are dropped at the change. Averages gain most where the rate is not annealed, as a constant schedule; they cost
    no time at inference. Running statistics, as BatchNorm's, are averaged like weights.

    Which average is kept is chosen on the validation data, so that its own metric there is optimistic.

    Args:
        keep: How many checkpoints, at least 1; each takes as much disk as the model.
        method: `"greedy_soup"`: from the best on, each joins if the average is then no worse (one more validation for
            each); `"uniform_soup"`: all.
        monitor: The validation metric; None: an accuracy or its like, else the perplexity, else the loss.
        mode: Whether a lower (`"min"`) or higher (`"max"`) `monitor` is better; `"auto"`: told by its name.
        begin: The share of training, in [0, 1), before which nothing is kept.
        dry_run: Decide and record, and keep the final weights.
        name: Tells two instances apart in a checkpoint.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    def __init__(
        self,
        *,
        keep: int = 5,
        method: str = "greedy_soup",
        monitor: str | None = None,
        mode: str = "auto",
        begin: float = 0.5,
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(dry_run=dry_run, name=name)
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ConfigurationError(f"keep must be a whole number of checkpoints of at least 1, got {keep!r}.")
        if method not in _METHODS:
            raise ConfigurationError(f"method must be one of {', '.join(_METHODS)}, got {method!r}.")
        if monitor is not None and not (isinstance(monitor, str) and monitor):
            raise ConfigurationError(f"monitor must name a validation metric, such as val/accuracy, got {monitor!r}.")
        if mode not in ("auto", "min", "max"):
            raise ConfigurationError(f"mode must be 'auto', 'min' or 'max', got {mode!r}.")
        if isinstance(begin, bool) or not isinstance(begin, (int, float)) or not 0 <= begin < 1:
            raise ConfigurationError(f"begin must be a share of training in [0, 1), got {begin!r}.")
        self.keep = keep
        self.method = method
        self.monitor = monitor
        self.mode = metric_mode(monitor, callback="WeightSoup") if monitor and mode == "auto" else mode
        self.begin = begin
        self._kept: list[dict[str, Any]] = []  # step and metric, best first

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Moves behind the other callbacks: averages are validated once the trainer is as it was found."""
        if stage == "fit":
            self._kept = []
            self.on_exit(_lightning.run_last(trainer, self))
        super().setup(trainer, pl_module, stage)

    def check(self, trainer: Any, pl_module: Any) -> None:
        """Refuses manual optimization and sharded parameters."""
        _lightning.refuse_unsupported(trainer, pl_module, callback=type(self).__name__)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Moves before those that work on the final weights as well: all have moved to the end by now."""
        super().on_fit_start(trainer, pl_module)
        _lightning.run_before(trainer, self, _MUST_FOLLOW)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Drops what a run that went further before it was killed had kept."""
        if self.begin > 0:
            _lightning.refuse_endless(trainer, user=type(self).__name__)
        folder = self._folder(trainer)
        if _lightning.is_rank_zero(trainer):
            _tidy(folder, [entry["step"] for entry in self._kept])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the weights if they are among the best."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or _lightning.progress(trainer) < self.begin:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        chosen = self._metric(metrics)
        metric = _lightning.broadcast(trainer, None if chosen is None else metrics[chosen[0]])
        step = int(trainer.global_step)
        if chosen is None or not math.isfinite(metric):
            return
        entries = [entry for entry in self._kept if entry["step"] != step]
        entries.append({"step": step, "metric": metric})
        entries.sort(key=lambda entry: entry["metric"], reverse=chosen[1] == "max")
        self._kept = entries[: self.keep]
        folder = self._folder(trainer)
        if self._kept and _lightning.is_rank_zero(trainer):
            if any(entry["step"] == step for entry in self._kept):
                _save(_weights(pl_module), folder, step)
            _tidy(folder, [entry["step"] for entry in self._kept])

    def _metric(self, metrics: Mapping[str, float]) -> tuple[str, str] | None:
        """Returns the metric's name and which way is better; None where the module logs none that tells."""
        if self.monitor is None:
            return choose_metric(name for name in metrics if not name.startswith("train"))
        if self.monitor not in metrics:
            raise ConfigurationError(
                f"WeightSoup: monitor={self.monitor} is not logged by validation; there are:"
                f" {', '.join(sorted(metrics)) or 'none'}."
            )
        return self.monitor, self.mode

    def on_decision(self, trainer: Any, pl_module: Any, decision: Decision) -> None:
        """Drops what was kept of another model."""
        if decision.knob in _OTHER_UNITS and self._kept:
            self._kept = []
            folder = self._folder(trainer)
            if _lightning.is_rank_zero(trainer):
                _tidy(folder, [])

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """After fit, averages, validates and keeps what is better; the other callbacks have left the trainer."""
        if stage == "fit" and self._kept:
            self._serve(trainer, pl_module)
        super().teardown(trainer, pl_module, stage)

    def _serve(self, trainer: Any, pl_module: Any) -> None:
        final = {name: tensor.detach().cpu().clone() for name, tensor in _weights(pl_module).items()}
        first = validate_again(trainer, pl_module)
        chosen = self._metric(first)
        if chosen is None:
            return
        metric, mode = chosen

        def evaluate(state: Mapping[str, Tensor]) -> float:
            pl_module.load_state_dict(state)
            return _lightning.broadcast(trainer, validate_again(trainer, pl_module)[metric])

        old = _lightning.broadcast(trainer, first[metric])
        states = [_load(self._folder(trainer), entry["step"]) for entry in self._kept]
        if math.isfinite(old) and not any(entry["step"] == trainer.global_step for entry in self._kept):
            states.append(final)
        # Each rank reads the same files and the same metrics, and so comes to the same average.
        options: dict[str, Any] = {"evaluate": evaluate, "mode": mode} if self.method == "greedy_soup" else {}
        soup = merge(states, self.method, **options)
        new = evaluate(soup)
        better = is_better(new, old, mode)
        if not better or self.dry_run:
            pl_module.load_state_dict(final)
        if better and not self.dry_run:
            trainer.save_checkpoint(self._folder(trainer) / "soup.ckpt")
        verdict = "takes their place" if better else "is no better and is left out"
        self.record(
            trainer,
            "weights",
            old=old,
            new=new if better else old,
            reason=f"{metric} {old:.4g} with the final weights and {new:.4g} with an average of the best of"
            f" {len(states)} checkpoints, which {verdict}",
            readings={f"step {entry['step']}": entry["metric"] for entry in self._kept},
            offer=False,
        )

    def _folder(self, trainer: Any) -> Path:
        return _lightning.run_folder(trainer) / FOLDER

    def state_dict(self) -> dict[str, Any]:
        """Returns what is kept: steps and metrics."""
        return {"kept": self._kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with that."""
        self._kept = list(state_dict["kept"])


def _weights(pl_module: Any) -> dict[str, Tensor]:
    return dict(pl_module.state_dict())


def _save(weights: Mapping[str, Tensor], folder: Path, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"step={step}.ckpt.part"
    torch.save({"state_dict": weights}, part)
    part.replace(folder / f"step={step}.ckpt")


def _load(folder: Path, step: int) -> dict[str, Tensor]:
    return torch.load(folder / f"step={step}.ckpt", map_location="cpu", weights_only=True)["state_dict"]


def _tidy(folder: Path, steps: list[int]) -> None:
    """Removes what is not kept."""
    wanted = {f"step={step}.ckpt" for step in steps}
    for path in folder.glob("step=*"):
        if path.name not in wanted:
            path.unlink()
