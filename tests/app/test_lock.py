"""Two processes and one run's folder."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from adaptrain.app.lock import LOCK_FILE, held
from adaptrain.errors import ConfigurationError
from adaptrain.report import Summary
from tests.processes import Python

fcntl = pytest.importorskip("fcntl", reason="this system has no record locks")

HOLD = """
import os, sys, time
from pathlib import Path
from adaptrain.app.lock import held
from adaptrain.errors import ConfigurationError
folder, start = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0.0, start - time.time()))
try:
    with held(folder):
        if sys.argv[3:] == ["forks"] and os.fork() == 0:
            os.setsid()
            time.sleep(30)
        (folder / "holds").write_text(str(os.getpid()))
        time.sleep(float(sys.argv[3]) if sys.argv[3:] != ["forks"] else 60)
    print("held")
except ConfigurationError as error:
    print(error)
"""


def test_of_several_that_start_at_once_one_holds_it(tmp_path: Path) -> None:
    start = time.time() + 3
    racing = [Python("-c", HOLD, tmp_path / "run", start, 3) for _ in range(3)]
    said = sorted(process.wait().stdout.strip() for process in racing)
    assert sum(line == "held" for line in said) == 1
    assert sum(line.startswith(f"{tmp_path / 'run'} is in use: ") for line in said) == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"holds"}


def test_it_goes_from_one_to_the_next(tmp_path: Path) -> None:
    for _ in range(2):
        with held(tmp_path / "run"):
            assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK_FILE}
        assert not any((tmp_path / "run").iterdir())


def test_a_killed_process_holds_nothing_even_where_its_workers_live_on(tmp_path: Path) -> None:
    holder = Python("-c", HOLD, tmp_path, 0, "forks")
    while not (tmp_path / "holds").exists() or not (tmp_path / "holds").read_text():
        time.sleep(0.05)
    pid = int((tmp_path / "holds").read_text())
    with pytest.raises(ConfigurationError, match=f"process {pid} on .* trains in it"), held(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    holder.wait()
    with held(tmp_path):
        pass


def test_a_full_disk_is_no_reason_to_wait(tmp_path: Path) -> None:
    script = (
        "import os, resource, sys\n"
        "from pathlib import Path\n"
        "from adaptrain.app.lock import held\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "with held(Path(sys.argv[1])):\n"
        "    os._exit(7)\n"
    )
    assert Python("-c", script, tmp_path / "run").wait(timeout=60).returncode == 7
    assert (tmp_path / "run" / LOCK_FILE).read_bytes() == b""


def test_a_folder_in_which_nothing_was_written_before_a_kill_is_taken(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / LOCK_FILE).touch()
    done = Python(
        "-m", "adaptrain", *tiny, "callbacks=none", "trainer.max_steps=1", "run_dir=mine", folder=tmp_path
    ).wait()
    assert done.returncode == 0, done.stderr
    assert Summary.load(tmp_path / "mine").status == "finished"
    assert not (tmp_path / "mine" / LOCK_FILE).exists()
