"""Prints the report of finished runs, and writes each run's report.html anew.

python scripts/report.py runs/quickstart/2026-01-31_12-00-00
python scripts/report.py runs/quickstart/*      # several runs: also side by side
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from adaptrain.errors import ConfigurationError
from adaptrain.report import Summary, print_report, render_comparison, render_knobs, render_table, write_html
from adaptrain.report.content import without_summary
from adaptrain.report.html import check_run_folder
from adaptrain.report.knobs import decisions_of
from adaptrain.report.summary import SUMMARY_FILE


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", type=Path, help="the folder of a run")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a folder's name may hold what the terminal cannot say
    folders: list[Path] = parser.parse_args(arguments).run_dirs
    try:
        for folder in folders:
            check_run_folder(folder)
        summaries = [summary for folder in folders if (summary := report(folder)) is not None]
        if len(summaries) > 1:
            print_report(render_comparison(summaries))
        sys.stdout.flush()
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (BrokenPipeError, SystemExit):  # `| head` has seen enough; rich ends the program where it notices first
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def report(folder: Path) -> Summary | None:
    """Prints one run and writes its page; returns the summary of a finished run."""
    page = write_html(folder)
    summary = Summary.load(folder) if (folder / SUMMARY_FILE).is_file() else None
    if summary is None:
        print(f"{folder}: {without_summary(folder)[1]}")
        print_report(render_knobs(decisions_of(folder)))
    else:
        print_report(render_table(summary))
    print(f"page: {page}\n")
    return summary


if __name__ == "__main__":
    sys.exit(main())
