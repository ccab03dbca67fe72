"""After training: validate and test the final weights, measure, and leave the report."""

from __future__ import annotations

import logging
import math
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from adaptrain.app import config, runs
from adaptrain.app.overview import program
from adaptrain.budget import Budget
from adaptrain.errors import ConfigurationError

log = logging.getLogger(__name__)


class Measured:
    """What training took, while it is the body of a `with`: time and peak memory.

    Args:
        wall_clock: The `WallClock` callback, whose time goes on over resumed runs; None: this process's time.
    """

    def __init__(self, wall_clock: Any | None) -> None:
        from adaptrain.resources.peak import PeakMemory

        self._wall_clock = wall_clock
        self._peak = PeakMemory()
        self._began = 0.0
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.seconds = 0.0
        self.peak_memory_bytes = 0

    def __enter__(self) -> Measured:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._peak.reset()
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        took = time.monotonic() - self._began
        self.seconds = self._wall_clock.state_dict()["elapsed_s"] if self._wall_clock is not None else took
        self._peak.close()
        on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
        self.peak_memory_bytes = torch.cuda.max_memory_allocated() if on_gpu else self._peak.read()


def load_baseline(cfg: DictConfig, data: Any) -> Any | None:
    """Reads the run named by `report.baseline`, if any.

    Raises:
        ConfigurationError: It is no finished run, or not of the same data and metric.
    """
    if cfg.report.baseline is None:
        return None
    from adaptrain import report

    metric, _ = config.metric_of(data.task)
    return report.load_baseline(cfg.report.baseline, data=data.describe(), metric=metric)


def check_latency_input(cfg: DictConfig, model: Any) -> tuple[int, int]:
    """Returns the shape to measure at: samples, tokens of each.

    Raises:
        ConfigurationError: It is no such shape, or the model cannot read it.
    """
    from adaptrain.pruning import cost

    shape = config.as_plain(cfg.report.latency_input)
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
        raise ConfigurationError(
            f"report.latency_input must be two whole numbers, samples and tokens of each, got {shape!r}."
            " Give for example report.latency_input=[32,128]."
        )
    cost.example_inputs(model.model, *shape)
    return shape[0], shape[1]


def finish(
    cfg: DictConfig,
    folder: Path,
    *,
    trainer: Any,
    model: Any,
    data: Any,
    named: dict[str, Any],
    measured: Measured,
    budget: Budget,
    baseline: Any | None,
    latency_input: tuple[int, int],
    optimized: str,
    facts: dict[str, Any],
) -> float | None:
    """Validates and tests the final weights, writes the summary and the page, and prints the table.

    Returns:
        The value of the metric named `optimized`, NaN where it is not finite; None on ranks other than zero.

    Raises:
        ConfigurationError: No such metric was logged; the run's report is complete all the same.
    """
    from adaptrain import report
    from adaptrain.callbacks.base import decision_log
    from adaptrain.report.content import DIVERGED

    trained = _numbers(trainer.callback_metrics)
    # The last weights: an earlier checkpoint, however good, may hold a model from before a structural event.
    trainer.save_checkpoint(folder / runs.CHECKPOINTS / "last.ckpt")
    final = _merged(trainer.validate(model, datamodule=data, verbose=False))
    test = _merged(trainer.test(model, datamodule=data, verbose=False))
    metric, mode = config.metric_of(data.task)
    values = trained | final | test
    decisions = decision_log(trainer)
    if not trainer.is_global_zero:
        return None
    pruning = named.get("pruning")
    spent = decisions.where(lambda decision: decision.knob == "wall_clock" and decision.applied)
    lost = [name for name, value in final.items() if (name == metric or "loss" in name) and not math.isfinite(value)]
    summary = report.summarize(
        module=model,
        experiment=cfg.experiment_name,
        run_dir=folder,
        seed=cfg.seed,
        started=measured.started,
        status=DIVERGED if lost else "wall clock" if spent else "finished",
        versions=facts["versions"],
        hardware=facts["hardware"],
        data=data.describe(),
        metric=metric,
        mode=mode,
        final_metrics=trained | final,
        test_metrics=test,
        optimized_metric=optimized,
        latency_input=latency_input,
        budget=budget,
        decisions=decisions,
        pruning_report=pruning.report() if pruning is not None else None,
        baseline=baseline,
        peak_memory_bytes=measured.peak_memory_bytes,
        train_time_s=measured.seconds,
    )
    summary.save(folder)
    report.print_report(report.render_table(summary, decisions=list(decisions)))
    page = report.write_html(folder)
    if lost:
        log.warning(
            "Training diverged: %s of the final model is no number. Lower model.lr, or let the learning rate controller"
            " keep such steps out: callbacks=[default].",
            " and ".join(lost),
        )
    log.info("The whole report: %s", page)
    if pruning is not None and baseline is None:
        log.info(
            "Compare with a plain run: %s ... callbacks=none, and then this one with report.baseline=<its folder>",
            program(),
        )
    if optimized not in values:
        raise config.unknown_metric(optimized, values)
    return values[optimized]


def _numbers(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _merged(results: list[Any]) -> dict[str, float]:
    return {name: float(value) for result in results for name, value in result.items()}
