"""Says what a model of a run's family makes of texts: a label for each, or how a language model goes on.

python scripts/predict.py --run runs/model_family/2026-01-31_12-00-00 --table
python scripts/predict.py --run runs/model_family/2026-01-31_12-00-00 --latency-ms 20 texts.txt
python scripts/predict.py --run runs/model_family/2026-01-31_12-00-00 --cascade 0.5 < texts.txt
echo "import os" | python scripts/predict.py --run runs/model_family/2026-01-31_12-00-00 --member dense --json

Texts come one a line, from a file, from standard input, or with --text. Out comes one line for each, in their order:
label and confidence, or the continuation with its line breaks as \\n; with --json an object with all of it.
Without limits the best member by its validation metric answers; with them the best that meets all, as measured on this
device.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from adaptrain.app.cores import share_cores
from adaptrain.errors import ConfigurationError

CHUNK = 1024  # texts that are read, sorted by length and answered together
BATCH = 32
LONG = 200  # texts from which on there is a progress bar
LIMITS = ("latency_ms", "memory_mib", "params_m", "metric_at_least")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    given = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a text may hold what the terminal cannot say
    share_cores()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run(given)
        sys.stdout.flush()
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", metavar="FILE", default="-", help="a text a line (default: standard input)")
    parser.add_argument("--run", required=True, metavar="RUN_DIR", help="the folder of a run with FamilyCheckpoint")
    parser.add_argument("--text", action="append", help="a text, instead of FILE; may be given several times")
    parser.add_argument("--table", action="store_true", help="print the members and what they cost, and answer nothing")
    chosen = parser.add_argument_group("which member answers")
    chosen.add_argument("--member", metavar="NAME", help="this one")
    chosen.add_argument(
        "--cascade",
        type=float,
        metavar="COST",
        help="a small one, and a larger one too where that is unsure, in this fraction of the slowest one's time",
    )
    chosen.add_argument("--latency-ms", type=float, metavar="MS", help="at most, for a forward pass")
    chosen.add_argument("--memory-mib", type=float, metavar="MIB", help="at most, weights and tensors of a pass")
    chosen.add_argument("--params-m", type=float, metavar="M", help="at most, millions of parameters")
    chosen.add_argument("--metric-at-least", type=float, metavar="X", help="of validation (perplexity: at most)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="texts at once; limits are judged at it")
    parser.add_argument("--device", help="cpu, cuda, ... (default: as in training, where there is one)")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="of a continuation (default: 32)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def run(given: argparse.Namespace) -> None:
    """Answers, or prints the table."""
    limits = {name: getattr(given, name) for name in LIMITS if getattr(given, name) is not None}
    if (given.member is not None) + (given.cascade is not None) + bool(limits) > 1:
        raise ConfigurationError("--member, --cascade and limits each say who answers: give one of the three.")
    source = Path(given.file)
    if given.text is None and given.file != "-" and not source.is_file():
        raise ConfigurationError(f"There is no file {source}. Give a text a line, or --text TEXT.")

    from adaptrain import ModelFamily
    from adaptrain.report import print_report

    family = ModelFamily.load(given.run, device=given.device)
    if given.table:
        print_report(family.table(batch_size=given.batch_size))
        return
    if given.cascade is not None:
        answering = family.cascade(given.cascade, batch_size=given.batch_size or BATCH)
        print(f"answering: {answering!r}\n{answering.report}", file=sys.stderr)
    else:
        limits["batch_size"] = given.batch_size
        answering = family.select(**limits) if given.member is None else family[given.member]
        print(f"answering: {answering!r}", file=sys.stderr)
    with texts_of(given) as (texts, total):
        answer(answering, texts, total, given)


@contextlib.contextmanager
def texts_of(given: argparse.Namespace) -> Iterator[tuple[Iterable[str], int | None]]:
    """Yields the texts and how many there are, where that is known."""
    if given.text is not None:
        yield given.text, len(given.text)
    elif given.file != "-":
        with Path(given.file).open(encoding="utf-8", errors="replace") as file:
            total = sum(1 for _ in file)
            file.seek(0)
            yield (line.rstrip("\r\n") for line in file), total
    else:
        if sys.stdin.isatty():
            print("A text a line; Ctrl-D ends.", file=sys.stderr)
        yield (line.rstrip("\r\n") for line in sys.stdin), None


def answer(model: Any, texts: Iterable[str], total: int | None, given: argparse.Namespace) -> None:
    """Prints what `model.predict` says of the texts, as they come."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    typed = given.text is None and given.file == "-" and sys.stdin.isatty()
    options = {"batch_size": given.batch_size or BATCH}
    if given.cascade is None:
        options["max_new_tokens"] = given.max_new_tokens
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=typed) as bar:
        task = bar.add_task("texts", total=total, visible=total is not None and total >= LONG)
        iterator, done = iter(texts), 0
        while chunk := list(islice(iterator, 1 if typed else CHUNK)):
            for text, found in zip(
                chunk, model.predict(chunk, **options, progress=lambda more: bar.advance(task, more)), strict=True
            ):
                print(line_of(text, found, as_json=given.json))
            sys.stdout.flush()
            done += len(chunk)
            bar.update(task, visible=bar.tasks[task].visible or done >= LONG)


def line_of(text: str, found: Any, *, as_json: bool) -> str:
    """Returns the line for one text."""
    if as_json:
        return json.dumps({"text": text, **asdict(found)}, ensure_ascii=False)
    if found.confidence is None:
        return found.output.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{found.output}\t{found.confidence:.3f}"


if __name__ == "__main__":
    sys.exit(main())
