"""The numbers of one finished run: what `summary.json` holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from adaptrain.errors import ConfigurationError

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model, measured. None: not measured.

    Args:
        metric: The validation metric named in `Summary.metric`.
        test_metric: The same metric on the test split.
        params: Parameters.
        flops: Floating-point operations of one forward pass at `latency_input`.
        latency_ms: Median time of one forward pass at `latency_input`, in milliseconds.
        latency_input: The shape measured at: samples, tokens per sample.
        size_bytes: The weights as saved on disk, in bytes.
        peak_memory_bytes: The most memory the training process held, in bytes.
        train_time_s: Seconds of training, resumed runs counted in.
    """

    params: int
    flops: int | None = None
    latency_ms: float | None = None
    latency_input: tuple[int, int]
    size_bytes: int | None = None
    metric: float | None = None
    test_metric: float | None = None
    peak_memory_bytes: int | None = None
    train_time_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """One limit of the budget and whether the run kept it.

    Args:
        name: A field of `Budget`, such as `"latency"` (a fraction of the dense model's) or `"memory_gib"`.
        limit: What was allowed, in the unit of that field.
        value: What came out, in the same unit; None: not measured.
        met: Whether the limit was kept.
    """

    name: str
    limit: float
    value: float | None
    met: bool


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished run in numbers.

    Args:
        experiment: The experiment's name.
        run_dir: The run's folder.
        seed: The seed.
        started: When the run started, ISO 8601.
        status: `"finished"`, `"wall clock"`, `"diverged"` or `"interrupted"`.
        versions: Package versions by name.
        hardware: What it ran on.
        data: The data module's own description: source, sizes of splits, labels.
        metric: `{"name": "val/accuracy", "mode": "max" | "min"}`.
        optimized_metric: `{"name": str, "value": float | None}`, what a sweep optimizes.
        dense: The dense model, or None where there is nothing to compare with.
        dense_source: What exactly the dense column is, in words for a person; empty without one.
        final: The model as training left it.
        constraints: The limits of the budget.
        decisions: How many decisions each knob took, dry-run ones included.
    """

    experiment: str
    run_dir: str
    seed: int
    started: str
    status: str
    versions: dict[str, Any]
    hardware: dict[str, Any]
    data: dict[str, Any]
    metric: dict[str, str]
    optimized_metric: dict[str, Any]
    dense: Column | None
    dense_source: str
    final: Column
    constraints: tuple[Constraint, ...]
    decisions: dict[str, int]

    @property
    def met(self) -> bool:
        """Whether every limit of the budget was kept."""
        return all(constraint.met for constraint in self.constraints)

    def save(self, run_dir: str | os.PathLike[str] | None = None) -> Path:
        """Writes `summary.json` into `run_dir` (default: the run's own folder) and returns its path."""
        path = Path(run_dir if run_dir is not None else self.run_dir) / SUMMARY_FILE
        text = json.dumps(asdict(self), indent=2, allow_nan=False, default=str)
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str]) -> Summary:
        """Reads the summary of a finished run. `run_dir` of the result is the folder it was read from.

        Args:
            run_dir: A run's folder.

        Raises:
            ConfigurationError: The folder is no finished run, or its summary is not what `save` writes.
        """
        folder = Path(run_dir)
        path = folder / SUMMARY_FILE
        if not folder.is_dir():
            raise ConfigurationError(f"There is no run folder {folder}. Give the folder of a run, such as runs/*/*.")
        if not path.is_file():
            raise ConfigurationError(
                f"{folder} is no finished run: it has no {SUMMARY_FILE}. A run writes it when training ends;"
                f" finish this one with resume={folder}, or give another folder."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls._from_json(values | {"run_dir": str(folder)})
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"{path} is not a summary this version of adaptrain can read: {error}."
                " Run the training again, or read it with the version that wrote it."
            ) from error

    @classmethod
    def _from_json(cls, values: Mapping[str, Any]) -> Summary:
        _check_keys(cls, values)
        for name in ("versions", "hardware", "data", "metric", "optimized_metric", "decisions"):
            _check_type(name, values[name], dict)
        for name in ("experiment", "started", "status", "dense_source"):
            _check_type(name, values[name], str)
        _check_type("seed", values["seed"], int)
        _check_type("constraints", values["constraints"], list)
        if set(values["metric"]) != {"name", "mode"} or values["metric"]["mode"] not in ("max", "min"):
            raise ValueError(f"metric must hold a name and the mode max or min, not {values['metric']!r}")
        nested = {
            "dense": None if values["dense"] is None else _column("dense", values["dense"]),
            "final": _column("final", values["final"]),
            "constraints": tuple(_constraint(item) for item in values["constraints"]),
        }
        return cls(**{**values, **nested})


def _column(where: str, values: Any) -> Column:
    _check_type(where, values, dict)
    _check_keys(Column, values)
    for name, value in values.items():
        if name == "latency_input":
            if not (isinstance(value, list) and len(value) == 2 and all(type(size) is int for size in value)):
                raise ValueError(f"{where}.latency_input must be two whole numbers, not {value!r}")
        elif value is not None or name == "params":
            _check_number(f"{where}.{name}", value)
    return Column(**{**values, "latency_input": tuple(values["latency_input"])})


def _constraint(values: Any) -> Constraint:
    _check_type("constraints", values, dict)
    _check_keys(Constraint, values)
    _check_type("constraints.name", values["name"], str)
    _check_type("constraints.met", values["met"], bool)
    _check_number("constraints.limit", values["limit"])
    if values["value"] is not None:
        _check_number("constraints.value", values["value"])
    return Constraint(**values)


def _check_keys(kind: type, values: Mapping[str, Any]) -> None:
    expected = {spec.name for spec in fields(kind)}
    if missing := sorted(expected - set(values)):
        raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}")
    if unknown := sorted(set(values) - expected):
        raise ValueError(f"{kind.__name__} has unknown {', '.join(unknown)}")


def _check_type(where: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{where} must be a {kind.__name__}, not {value!r}")


def _check_number(where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where} must be a number, not {value!r}")
