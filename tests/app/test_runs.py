"""The folders of runs that start together."""

from __future__ import annotations

import time
from pathlib import Path

from adaptrain.report import Summary
from tests.processes import Python

RACE = """
import sys, time
from pathlib import Path
from adaptrain.app.runs import claim
folder, start = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0.0, start - time.time()))
for second in range(100):
    print(claim(folder / f"second-{second}").name)
"""


def test_each_of_several_processes_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    start = time.time() + 3
    racing = [Python("-c", RACE, tmp_path / "runs", start) for _ in range(3)]
    done = [process.wait() for process in racing]
    assert [each.returncode for each in done] == [0] * 3, done[0].stderr
    names = [name for each in done for name in each.stdout.split()]
    assert len(names) == len(set(names)) == 300
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(names)
    assert {f"second-{second}{number}" for second in range(100) for number in ("", "_2", "_3")} == set(names)


def test_two_runs_that_start_in_the_same_second_leave_two_folders(tiny: list[str], tmp_path: Path) -> None:
    script = (
        "import sys, datetime\n"
        "from adaptrain.app import runs\n"
        "class Frozen(datetime.datetime):\n"
        "    now = classmethod(lambda cls, *_: cls(2026, 1, 31))\n"
        "runs.datetime = Frozen\n"
        "from adaptrain.app.train import main\n"
        "main()\n"
    )
    arguments = [*tiny, "callbacks=none", "trainer.max_steps=2"]
    runs = [Python("-c", script, *arguments, f"seed={seed}", folder=tmp_path) for seed in (1, 2)]
    for done in [run.wait() for run in runs]:
        assert done.returncode == 0, done.stderr
    parent = tmp_path / "runs" / "train"
    assert sorted(path.name for path in parent.iterdir()) == ["2026-01-31_00-00-00", "2026-01-31_00-00-00_2"]
    assert sorted(Summary.load(path).seed for path in parent.iterdir()) == [1, 2]
