"""Decisions: the one currency between the parts, and the run's record of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One change of one knob, with the reason for it.

    Args:
        step: The optimizer step (Lightning's `global_step`) at which it was taken.
        knob: What changes: `"micro_batch_size"`, `"global_batch_size"`, `"learning_rate"`, `"structure"`, ...
        old: The value before, as plain Python.
        new: The value after, as plain Python.
        reason: One sentence for a person.
        readings: The numbers that led to it, by name.
        applied: False where it was only recorded (`dry_run=True`).
        source: The callback that took it.
    """

    step: int
    knob: str
    old: Any
    new: Any
    reason: str
    readings: Mapping[str, Any] = field(default_factory=dict)
    applied: bool = True
    source: str = ""

    def to_json(self) -> str:
        """Returns the decision as one line of strict JSON (a non-finite number becomes a string)."""
        return json.dumps(_plain(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Decision:
        """Reads what `to_json` wrote."""
        return cls(**json.loads(line))


def _plain(value: Any) -> Any:
    """Turns `value` into what strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


class DecisionLog:
    """The decisions of one run, in memory and, where a path is given, in a JSON-lines file.

    Every decision is on disk when `append` returns, so that a killed run keeps its record. A run that resumes
    drops the decisions after the step it resumes from: it takes them again. A new run in the same folder keeps the
    older file beside the new one as `decisions.1.jsonl`, `decisions.2.jsonl`, ...

    Args:
        path: The file, or None for memory only (as on every rank but the first).
        resume_step: None for a new run; the step a resumed run starts from.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, resume_step: int | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self._decisions: list[Decision] = []
        if self.path is None:
            return
        if self.path.exists() and resume_step is None:
            self.path.rename(_next_free(self.path))
        elif self.path.exists():
            self._decisions = [d for d in read_decisions(self.path) if d.step <= (resume_step or 0)]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(d.to_json() + "\n" for d in self._decisions), encoding="utf-8")
            partial.replace(self.path)

    def append(self, decision: Decision) -> None:
        """Adds `decision` and writes it out."""
        self._decisions.append(decision)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(decision.to_json() + "\n")

    def where(self, matches: Callable[[Decision], bool]) -> list[Decision]:
        """Returns the decisions for which `matches` is true, oldest first."""
        return [decision for decision in self._decisions if matches(decision)]

    def __iter__(self) -> Iterator[Decision]:
        return iter(tuple(self._decisions))

    def __len__(self) -> int:
        return len(self._decisions)


def read_decisions(path: str | os.PathLike[str]) -> list[Decision]:
    """Reads a `decisions.jsonl`; a last line cut short by a crash is left out.

    Args:
        path: The file.

    Returns:
        The decisions, oldest first.

    Raises:
        ValueError: A line before the last is not a decision.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    decisions = []
    for number, line in enumerate(lines, start=1):
        try:
            decisions.append(Decision.from_json(line))
        except (json.JSONDecodeError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not a decision: {error}") from error
    return decisions


def _next_free(path: Path) -> Path:
    number = 1
    while (candidate := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return candidate
