"""metrics.csv of a run, which a resumed run continues."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

FILE_NAME = "metrics.csv"


class RunCSVLogger(Logger):
    """Writes metrics to `<folder>/metrics.csv`, one row for each call, on disk when the call returns.

    Lightning's own CSVLogger deletes the file when a run goes on in the same folder. This one appends, and a metric
    that appears later becomes a new column, empty in the rows before.

    Args:
        folder: The run's folder; made when the first metric arrives.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self._path = Path(folder) / FILE_NAME
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._path.parent.name

    @property
    def version(self) -> str:
        """Empty: a run is one version."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder."""
        return str(self._path.parent)

    @property
    def log_dir(self) -> str:
        """The folder."""
        return str(self._path.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Appends one row.

        Args:
            metrics: Numbers by name; tensors of one element are read.
            step: The step they belong to.
        """
        row = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        row["step"] = step
        if self._columns is None:
            self._columns = _header(self._path)
        new = [name for name in row if name not in self._columns]
        if new:
            old_rows = read_rows(self._path)
            self._columns = sorted({*self._columns, *new})
            write_rows(self._path, old_rows, self._columns)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a metrics file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, str]], columns: list[str]) -> None:
    """Writes a metrics file in one move, so that a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def drop_rows_from(path: Path, step: int) -> None:
    """Removes the rows of steps that a run resumed at `step` takes again, and a last row that a crash cut short."""
    columns = _header(path)
    if not columns:
        return
    kept = [row for row in read_rows(path) if _whole(row) and int(row["step"]) < step]
    write_rows(path, kept, columns)


def _whole(row: dict[str, str]) -> bool:
    return None not in row.values() and (row.get("step") or "").isdigit()


def _header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])
