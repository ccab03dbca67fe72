"""Reading text, and its labels, from csv, tsv, jsonl, parquet and txt files."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrain.errors import ConfigurationError

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review", "body", "utterance", "question", "title")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic")
_HEADERLESS = ("text", "label")


@dataclass(frozen=True)
class Table:
    """The columns of a file.

    Args:
        path: The file.
        columns: Each column's values by its name, all of one length.
        headerless: Whether it was a file of two columns without a header.
    """

    path: Path
    columns: dict[str, list[Any]]
    headerless: bool = False

    def pick(self, wanted: str | None, usual: Sequence[str], *, argument: str) -> tuple[str, list[Any]]:
        """Returns one column: its name and its values.

        Args:
            wanted: Its name; None: the first of `usual` there is, in whatever case.
            usual: The names it usually has.
            argument: The argument that names it, for the message.

        Raises:
            ConfigurationError: There is no such column, or a value is missing.
        """
        by_lower = {name.lower(): name for name in self.columns}
        name = wanted if wanted is not None else next((by_lower[u] for u in usual if u in by_lower), None)
        if name is None or name not in self.columns:
            looked_for = repr(wanted) if wanted is not None else f"of the usual names ({', '.join(usual)})"
            raise ConfigurationError(
                f"{self.path} has no column {looked_for}; its columns are {', '.join(map(repr, self.columns))}."
                f" Name the one to use: {argument}=..."
            )
        values = self.columns[name]
        if (row := next((i for i, value in enumerate(values) if value is None), None)) is not None:
            raise ConfigurationError(f"{self.path}, sample {row + 1}: column {name!r} has no value. Fill or remove it.")
        return name, values


def read_table(path: str | Path, *, argument: str, headerless: bool | None = None) -> Table:
    """Reads a file by its extension.

    A csv or tsv file may lack a header: two columns, text and label, are recognised by the first line's last field
    being the label of another line. Fields of a tsv are taken as they stand, quotes included.

    Args:
        path: The file: .csv, .tsv, .jsonl (or .ndjson), .parquet or .txt.
        argument: The argument that named it, for messages.
        headerless: Whether a csv or tsv has no header; None: find out.

    Raises:
        ConfigurationError: The file is missing, empty, not of its format, or of a format that is not read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigurationError(f"{argument}={path} {kind} (the working folder is {Path.cwd()}). Give a file's path.")
    readers: dict[str, Callable[[Path], Table]] = {
        ".csv": lambda p: _read_delimited(p, ",", headerless),
        ".tsv": lambda p: _read_delimited(p, "\t", headerless),
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".parquet": _read_parquet,
        ".txt": _read_txt,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigurationError(
            f"{argument}={path}: files ending in {path.suffix or 'nothing'!r} are not read."
            f" Convert it to one of {', '.join(readers)}."
        )
    if not path.stat().st_size:
        raise ConfigurationError(f"{argument}={path} is empty.")
    try:
        table = reader(path)
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}."
            f" Convert it, for example with `iconv -f latin1 -t utf-8`."
        ) from error
    if not next(iter(table.columns.values()), None):
        raise ConfigurationError(f"{argument}={path} holds no samples.")
    return table


def _read_delimited(path: Path, delimiter: str, headerless: bool | None) -> Table:
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    limit = csv.field_size_limit(sys.maxsize)
    rows, lines, line = [], [], 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
            for row in reader:
                line = reader.line_num
                if row:
                    rows.append(row)
                    lines.append(line)
    except csv.Error as error:
        raise ConfigurationError(f"{path}, after line {line}: {error}. Correct the line.") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ConfigurationError(f"{path} holds no samples.")
    first = rows[0]
    if headerless is None:
        headerless = len(first) == 2 and any(row[-1] == first[-1] for row in rows[1:])
    header = list(_HEADERLESS) if headerless else first
    samples = rows if headerless else rows[1:]
    for row, line in zip(samples, lines[len(rows) - len(samples) :], strict=True):
        if len(row) != len(header):
            raise ConfigurationError(
                f"{path}, line {line}: {len(row)} fields where there are {len(header)} columns"
                f" ({', '.join(map(repr, header))}). Correct or quote the line."
            )
    return Table(path, {name: [row[i] for row in samples] for i, name in enumerate(header)}, headerless)


def _read_jsonl(path: Path) -> Table:
    records = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigurationError(f"{path}, line {number} is not JSON: {error}. Correct the line.") from error
            if not isinstance(record, dict):
                raise ConfigurationError(
                    f"{path}, line {number} is {type(record).__name__}, not an object like"
                    ' {"text": "...", "label": "..."}. Write one object a line.'
                )
            records.append(record)
    names = dict.fromkeys(name for record in records for name in record)
    return Table(path, {name: [record.get(name) for record in records] for name in names})


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigurationError(f"Reading {path} needs pyarrow: pip install 'adaptrain[nlp]'.") from error
    try:
        return Table(path, pyarrow.parquet.read_table(path).to_pydict())
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigurationError(f"{path} is not a parquet file: {error}") from error


def _read_txt(path: Path) -> Table:
    """Paragraphs, which are set apart by blank lines; or lines, where nothing is."""
    text = path.read_text(encoding="utf-8-sig")
    paragraphs = [p for p in text.split("\n\n") if p.strip()]
    if len(paragraphs) < 2:
        paragraphs = [line for line in text.splitlines() if line.strip()]
    return Table(path, {"text": paragraphs})
