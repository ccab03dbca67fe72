"""Sweeps (`-m`): the table of jobs at their end."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from adaptrain.app import runs

_folders: list[Path] = []


class SweepCallback(Callback):
    """Hydra's callback that gathers the jobs of a sweep and prints them."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, float, str]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes the sweep's folder, to remove it should no job start."""
        _folders.append(Path(config.hydra.sweep.dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Notes what the job came to."""
        value = job_return.return_value if job_return.status is JobStatus.COMPLETED else None
        result = float(value) if isinstance(value, int | float) else math.nan
        self.jobs.append((" ".join(job_return.overrides or []), result, str(config.hydra.runtime.output_dir)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table.

        Raises:
            SystemExit: A job has no result.
        """
        if not self.jobs:
            return  # a launcher that runs jobs in other processes: each has written its own summary
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"sweep of {len(self.jobs)} jobs", title_justify="left")
        table.add_column("overrides", overflow="fold")
        table.add_column("metric", justify="right")
        table.add_column("run", overflow="fold")
        for overrides, value, folder in self.jobs:
            failed = math.isnan(value)
            table.add_row(overrides, "no result" if failed else f"{value:.4g}", os.path.relpath(folder))
        Console().print(table)
        if any(math.isnan(value) for _, value, _ in self.jobs):
            raise SystemExit(1)


def clean_up() -> None:
    """Removes the folder of a sweep that holds no job, only Hydra's record of the command."""
    while _folders:
        folder = _folders.pop()
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
            runs.discard(folder)
