from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.report.samples import plain_summary, run_folder, summary

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"


def report(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, timeout=120, check=False)


def test_several_runs_are_printed_compared_and_written(tmp_path: Path) -> None:
    runs = [
        run_folder(tmp_path / "pruned", summary=summary()),
        run_folder(tmp_path / "plain", summary=plain_summary()),
        run_folder(tmp_path / "großes-模型", summary=None),
    ]
    done = report(*runs, PYTHONIOENCODING="ascii", COLUMNS="80")
    text = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr.decode()
    assert "quickstart: finished, budget met" in text
    assert "interrupted or is still going" in text
    assert "run 1: " in text
    assert "run 2: " in text
    assert "run 3: " not in text
    assert all((run / "report.html").is_file() for run in runs)


def test_a_run_of_another_script_is_not_called_interrupted(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "version_0", summary=None)
    (run / "versions.json").unlink()
    done = report(run)
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert "not train.py's" in text
    assert "structure" in text  # what was decided
    page = (run / "report.html").read_text()
    assert "not train.py" in page
    assert "interrupted" not in page


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", summary=summary())
    command = f"{sys.executable} {SCRIPT} {' '.join([str(run)] * 40)} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0
    assert done.stderr == b""


def test_a_folder_that_is_no_run_ends_with_two_and_a_reason(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", summary=summary())
    done = report(run, tmp_path / "nothing")
    assert done.returncode == 2
    assert "nothing is no run: there is no such folder" in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert not (run / "report.html").exists()


def test_help_says_how_to_call_it() -> None:
    done = report("--help")
    assert done.returncode == 0
    assert b"RUN_DIR" in done.stdout
