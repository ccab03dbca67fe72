"""What the benchmarks share: results in a JSON file as they come, runs in processes of their own, and tables."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any


def load_results(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the results that a file holds, none where there is no file; ends the script if they do not compare."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise SystemExit(f"{path} holds results of other settings, {found['settings']}. Give another --json.")
    return found["results"]


def save_results(path: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Writes them in one piece."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"settings": settings, "results": results}, indent=1), encoding="utf-8")
    part.replace(path)


def run_in_process(run: Callable[..., Any], *, what: str, **arguments: Any) -> Any:
    """Returns what `run(**arguments)` returns in a fresh process, so that its memory is its own.

    Args:
        run: A function of a module.
        what: What it runs, for the message where it fails.
        **arguments: Its arguments.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(run, arguments, sender), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{what} failed; what is done is kept.") from None


def _send(run: Callable[..., Any], arguments: dict[str, Any], sender: Any) -> None:
    end_with_parent()
    sender.send(run(**arguments))


def end_with_parent() -> None:
    """Makes this process end when the one that started it is gone, also killed: else it would go on without it."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def aligned(rows: Sequence[Sequence[str]], *, right: bool = True) -> list[str]:
    """Returns rows of cells as lines of a table, the first of them a heading.

    Args:
        rows: Cells, as many in each row.
        right: Whether all columns but the first are flush right.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        if right:
            cells[1:] = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
