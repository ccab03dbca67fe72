"""Sweeps (`-m`): the table of jobs at their end."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, flag_override

from adaptrain.app import runs
from adaptrain.app.resume import SUMMARY_FILE

_folders: list[Path] = []


@dataclass(frozen=True)
class Job:
    """A job of a sweep: its overrides, the metric it returned (NaN: it has no result), and its folder."""

    overrides: tuple[str, ...]
    value: float
    folder: Path


class SweepCallback(Callback):
    """Hydra's callback that gathers the jobs of a sweep and prints them."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Makes the sweep's folder, which is none that another sweep has; it is removed should no job start."""
        wanted = Path(config.hydra.sweep.dir)
        folder = runs.claim(wanted)
        _folders.append(folder)
        if folder != wanted:
            quoted = str(folder).replace("'", "\\'")
            with flag_override(config, ["struct", "readonly"], [False, False]):
                config.hydra.sweep.dir = str(folder)
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")  # jobs compose theirs anew

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Notes what the job came to."""
        value = job_return.return_value if job_return.status is JobStatus.COMPLETED else None
        self.jobs.append(
            Job(
                overrides=tuple(job_return.overrides or ()),
                value=float(value) if isinstance(value, int | float) else math.nan,
                folder=Path(config.hydra.runtime.output_dir),
            )
        )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table.

        Raises:
            SystemExit: A job has no result.
        """
        if not self.jobs:
            return  # a launcher that runs jobs in other processes: each has written its own summary
        from rich.console import Console

        Console().print(table(self.jobs))
        if any(math.isnan(job.value) for job in self.jobs):
            raise SystemExit(1)


def table(jobs: list[Job]) -> Any:
    """Returns a rich table of jobs: what differs between them, the metric, where the run lies."""
    from rich.table import Table

    shared = set.intersection(*(set(job.overrides) for job in jobs))
    title = f"{len(jobs)} jobs of " + " ".join(override for override in jobs[0].overrides if override in shared)
    rows = Table(title=title, title_justify="left")
    rows.add_column("overrides", overflow="fold")
    rows.add_column(_metric_name(jobs), justify="right")
    rows.add_column("run", overflow="fold")
    for job in jobs:
        own = " ".join(override for override in job.overrides if override not in shared)
        value = "no result" if math.isnan(job.value) else f"{job.value:.4g}"
        rows.add_row(own, value, os.path.relpath(job.folder) if job.folder.is_dir() else "")
    return rows


def _metric_name(jobs: list[Job]) -> str:
    for job in jobs:
        path = job.folder / SUMMARY_FILE
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["optimized_metric"]["name"]
    return "metric"


def clean_up() -> None:
    """Removes the folder of a sweep that holds no job, only Hydra's record of the command."""
    while _folders:
        folder = _folders.pop()
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
            runs.discard(folder)
