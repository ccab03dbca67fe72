"""The members of a family as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from adaptrain.family.measure import shape_key
from adaptrain.report.content import metric_text, significant

if TYPE_CHECKING:
    from adaptrain.family.model_family import ModelFamily

_WIDTH = 100


class FamilyTable:
    """Metric, size and costs of each member, one a row. Rich prints it, and so does `print`.

    Args:
        family: The family.
        costs: What each member costs, by shape and name.
        device: Where that was measured.
    """

    def __init__(
        self, family: ModelFamily, costs: Mapping[tuple[int, int], Mapping[str, Mapping[str, float]]], device: str
    ) -> None:
        self.family, self.costs, self.device = family, costs, device

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(self.columns()):
            table.add_column(Text(column), overflow="fold", justify="left" if index == 0 else "right")
        for row in self.rows():
            table.add_row(*map(Text, row))
        yield table
        yield Text(f"One forward pass, samples x tokens, on {self.device}.", style="dim")

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=_WIDTH, color_system=None).print(self)
        return out.getvalue().rstrip()

    def columns(self) -> list[str]:
        """The head of each column."""
        split, _, short = (self.family.metric or "").rpartition("/")
        metric = [f"{short}\n({split})" if split else short] if short else []
        shapes = [shape_key(shape) for shape in self.costs]
        costs = [f"{name}\n{shapes[0]}" for name in ("FLOPs", "memory")]
        costs += [f"latency\n{shape}" for shape in shapes]
        return ["member", "step", *metric, "parameters", "size", *costs]

    def rows(self) -> list[list[str]]:
        """The cells of each member."""
        return [self._row(member) for member in self.family.members]

    def _row(self, member: Any) -> list[str]:
        metric = [] if self.family.metric is None else [metric_text(self.family.metric, member.metric)]
        cells = [member.name, str(member.step), *metric, f"{significant(member.params / 1e6)} M"]
        cells.append(f"{significant(member.size_bytes / 2**20)} MiB")
        own = [found[member.name] for found in self.costs.values()]
        cells.append(f"{significant(own[0]['flops'] / 1e9)} G")
        cells.append(f"{significant(own[0]['peak_memory_bytes'] / 2**20)} MiB")
        return cells + [f"{significant(found['latency_ms'])} ms" for found in own]
