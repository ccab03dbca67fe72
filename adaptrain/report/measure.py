"""From a trained module to its `Summary`: measures the final model and says what it is compared with."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from adaptrain.budget import FRACTIONS, Budget
from adaptrain.decisions import Decision
from adaptrain.errors import ConfigurationError
from adaptrain.report.summary import Column, Constraint, Summary

_log = logging.getLogger(__name__)

GIB = 2**30
# The step under way when the time is spent is finished and validated; that is no breach of the budget.
CLOCK_TOLERANCE = 1.02
# How a classifier cuts its text into tokens is a choice of the run; a perplexity is per token, so there it counts.
_READING = {"tokens", "median_length", "max_length", "vocab_size", "tokenizer"}


def load_baseline(run_dir: str | os.PathLike[str], *, data: Mapping[str, Any], metric: str) -> Summary:
    """Reads the run that a new one is to be compared with. Call it before training: it refuses what cannot compare.

    Args:
        run_dir: The folder of a finished plain run (`callbacks=none`).
        data: `describe()` of the new run's data module.
        metric: The validation metric of the new run.

    Returns:
        The baseline's summary.

    Raises:
        ConfigurationError: No finished run, other data, another metric, or a run that was itself pruned.
    """
    baseline = Summary.load(run_dir)
    hint = " Give another report.baseline, or leave it out."
    if baseline.status == "interrupted":
        raise ConfigurationError(
            f"The baseline {run_dir} was interrupted. Finish it first with resume={run_dir}, or leave it out."
        )
    here = json.loads(json.dumps(dict(data), default=str))
    free = {"notes"} if here.get("task") == "language_model" else {"notes", *_READING}
    keys = {*here, *baseline.data} - free
    if other := sorted(key for key in keys if here.get(key) != baseline.data.get(key)):
        seen = "; ".join(f"{key}: {baseline.data.get(key)!r} there, {here.get(key)!r} here" for key in other[:3])
        raise ConfigurationError(f"The baseline {run_dir} was trained on other data ({seen}).{hint}")
    if baseline.metric["name"] != metric:
        raise ConfigurationError(f"The baseline {run_dir} reports {baseline.metric['name']}, not {metric}.{hint}")
    if baseline.dense is not None and baseline.decisions.get("structure"):
        raise ConfigurationError(
            f"The baseline {run_dir} was itself pruned; a baseline is a plain run, made with callbacks=none.{hint}"
        )
    return baseline


def summarize(
    *,
    module: Any,
    experiment: str,
    run_dir: str | os.PathLike[str],
    seed: int,
    started: str,
    status: str,
    versions: Mapping[str, Any],
    hardware: Mapping[str, Any],
    data: Mapping[str, Any],
    metric: str,
    mode: str,
    final_metrics: Mapping[str, Any],
    test_metrics: Mapping[str, Any],
    optimized_metric: str,
    latency_input: tuple[int, int],
    budget: Budget,
    decisions: Iterable[Decision],
    pruning_report: Mapping[str, Any] | None = None,
    baseline: Summary | None = None,
    peak_memory_bytes: int | None = None,
    train_time_s: float | None = None,
) -> Summary:
    """Measures the final model and gathers what the report shows. Nothing is written: call `Summary.save`.

    Args:
        module: The trained LightningModule; its `.model` is the Hugging Face model that is measured.
        experiment: The experiment's name.
        run_dir: The run's folder.
        seed: The seed.
        started: When the run started, ISO 8601.
        status: `"finished"`, `"wall clock"`, `"diverged"` or `"interrupted"`.
        versions: Package versions by name.
        hardware: What it ran on.
        data: `describe()` of the data module.
        metric: The validation metric, such as `"val/accuracy"`; its test twin is `"test/accuracy"`.
        mode: `"max"` or `"min"`: which way `metric` is better.
        final_metrics: Validation metrics of the final model by name (numbers or tensors).
        test_metrics: Test metrics of the final model by name; empty where there is no test split.
        optimized_metric: The name of the metric a sweep optimizes, found among the metrics above.
        latency_input: Samples and tokens per sample to measure at; where pruning measured, its own shape counts.
        budget: The run's budget; limits that pruning did not answer for are checked here.
        decisions: The run's decisions.
        pruning_report: `ProgressivePruning.report()`, or None without pruning.
        baseline: A plain run to compare with, from `load_baseline`.
        peak_memory_bytes: The most memory the training process held.
        train_time_s: Seconds of training.

    Returns:
        The summary. Its dense column is the baseline where given, else the dense model that pruning measured
        before its first event, else absent.
    """
    measured = dict(pruning_report["final"]) if pruning_report else _measure(module.model, latency_input)
    shape = pruning_report["latency_input"] if pruning_report else latency_input
    values = {**final_metrics, **test_metrics}
    final = _column(
        measured,
        shape,
        metric=_number(values.get(metric)),
        test_metric=_number(values.get(_test_name(metric))),
        peak_memory_bytes=peak_memory_bytes,
        train_time_s=train_time_s,
    )
    dense, source = None, ""
    if baseline is not None:
        dense, final, source = _beside(baseline, final, module, pruning_report)
    elif pruning_report and pruning_report["dense"]["params"] != final.params:
        before = pruning_report["dense"]
        dense = _column(before, shape, metric=_number(before["metrics"].get(metric)))
        source = _before_pruning(before["step"], metric, dense.metric)
    decisions = list(decisions)
    return Summary(
        experiment=experiment,
        run_dir=str(run_dir),
        seed=seed,
        started=started,
        status=status,
        versions=dict(versions),
        hardware=dict(hardware),
        data=dict(data),
        metric={"name": metric, "mode": mode},
        optimized_metric={"name": optimized_metric, "value": _number(values.get(optimized_metric))},
        dense=dense,
        dense_source=source,
        final=final,
        constraints=_constraints(budget, pruning_report, final, decisions),
        decisions=dict(Counter(decision.knob for decision in decisions)),
    )


def _measure(model: Any, shape: tuple[int, int]) -> dict[str, Any]:
    from adaptrain.execution.oom import attempt, weights_on_host  # here: reading a report does not import torch
    from adaptrain.pruning import cost

    inputs = cost.example_inputs(model, *shape)
    times, lack = attempt(
        lambda: cost.measure_latency({"final": model}, inputs, copies=cost.COPIES), host_bytes=weights_on_host(model)
    )
    if times is None:
        _log.warning("There is no memory to measure the final model's latency (%s): the report leaves it out.", lack)
    return {
        "params": cost.count_params(model),
        "flops": cost.count_flops(model, inputs),
        "latency_ms": None if times is None else times["final"],
        "size_bytes": cost.size_on_disk_bytes(model),
    }


def _column(measured: Mapping[str, Any], shape: Iterable[int], **more: Any) -> Column:
    batch, length = shape
    costs = {name: measured[name] for name in ("params", "flops", "latency_ms", "size_bytes")}
    return Column(**costs, latency_input=(int(batch), int(length)), **more)


def _before_pruning(step: int | None, metric: str, value: float | None) -> str:
    if step is None:
        return "the dense model as built; it was not validated before the first structural event"
    source = f"the dense model as measured at step {step}, before the first structural event"
    return source if value is None else f"{source}; its {metric} is that of a partly trained model"


def _beside(
    baseline: Summary, final: Column, module: Any, pruning_report: Mapping[str, Any] | None
) -> tuple[Column, Column, str]:
    """The baseline's column, its costs measured in this process where its model can be built here."""
    source = f"baseline run {baseline.run_dir}"
    params = pruning_report["dense"]["params"] if pruning_report else final.params
    recorded = baseline.final
    if recorded.latency_input != final.latency_input:  # costs at another shape do not compare
        recorded = replace(recorded, flops=None, latency_ms=None)
    if baseline.final.params != params:
        return recorded, final, f"{source}, another model; its latency is as that run measured it"
    if pruning_report:
        here = pruning_report["dense"]
    else:
        here = _twin_costs(module, final)
        final = replace(final, latency_ms=here.pop("final_latency_ms")) if here else final
    if here is None or here["latency_ms"] is None:
        return recorded, final, f"{source}; its latency is as that run measured it"
    costs = {name: here[name] for name in ("params", "flops", "latency_ms", "size_bytes")}
    dense = replace(baseline.final, **costs, latency_input=final.latency_input)
    return dense, final, f"{source}; its latency measured again here, in turns with the final model"


def _twin_costs(module: Any, final: Column) -> dict[str, Any] | None:
    """The costs of the dense model and the final model's latency beside it; None where no dense twin can be built."""
    from adaptrain.execution.oom import attempt, weights_on_host
    from adaptrain.pruning import cost, families

    try:
        match = families.find_family(module)
    except ConfigurationError:
        return None

    def measure() -> dict[str, float]:
        models = {"dense": match.dense_twin(), "final": match.model}
        return cost.measure_latency(models, match.example_inputs(*final.latency_input), copies=cost.COPIES)

    latency, lack = attempt(measure, host_bytes=3 * weights_on_host(match.model))  # the twin, and copies of both
    if latency is None:
        _log.warning("There is no memory to measure the baseline's latency anew (%s): it is as that run had it.", lack)
    return latency and {
        "params": final.params,
        "flops": final.flops,
        "size_bytes": final.size_bytes,
        "latency_ms": latency["dense"],
        "final_latency_ms": latency["final"],
    }


def _constraints(
    budget: Budget, pruning_report: Mapping[str, Any] | None, final: Column, decisions: Iterable[Decision]
) -> tuple[Constraint, ...]:
    answered = [Constraint(**item) for item in pruning_report["constraints"]] if pruning_report else []
    seen = {constraint.name for constraint in answered}
    # Without pruning the final model is the dense one: every fraction of it is 1.
    own: dict[str, float | None] = dict.fromkeys(FRACTIONS, 1.0)
    own |= {"latency_ms": final.latency_ms, "params_m": final.params / 1e6}
    checks = [(name, limit, own[name]) for name, limit in budget.target.items() if name not in seen]
    if budget.trainable_params_m is not None:
        told = [each.new for each in decisions if each.knob == "trainable_params" and each.applied]
        checks.append(("trainable_params_m", budget.trainable_params_m, (told[-1] if told else final.params) / 1e6))
    if budget.memory_gib is not None:
        peak = None if final.peak_memory_bytes is None else final.peak_memory_bytes / GIB
        checks.append(("memory_gib", budget.memory_gib, peak))
    if budget.wall_clock_min is not None:
        spent = None if final.train_time_s is None else final.train_time_s / 60
        checks.append(("wall_clock_min", budget.wall_clock_min, spent))
    return (*answered, *(_check(*check) for check in checks))


def _check(name: str, limit: float, value: float | None) -> Constraint:
    allowed = limit * CLOCK_TOLERANCE if name == "wall_clock_min" else limit
    return Constraint(name=name, limit=limit, value=value, met=value is not None and value <= allowed)


def _test_name(metric: str) -> str:
    return f"test/{metric.partition('/')[2] or metric}"


def _number(value: Any) -> float | None:
    """`value` as a float; None for what is missing or not finite."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None
