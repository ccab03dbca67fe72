from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaptrain.app.config import experiments
from adaptrain.budget import Budget
from tests.app.conftest import Command

ROOT = Path(__file__).parents[2]


def test_alone_it_lists_the_experiments(command: Command, workplace: Path) -> None:
    result = command()
    assert result.code == 0
    for name, description in experiments().items():
        assert name in result.out
        assert description in result.out
    assert "python train.py +experiment=quickstart" in result.out
    assert list(workplace.iterdir()) == []


def test_help_explains_the_dial_and_the_groups(command: Command, workplace: Path) -> None:
    result = command("--help")
    assert result.code == 0
    for field in Budget().asdict():
        assert field in result.out
    for group in ("callbacks:", "data:", "model:", "trainer:", "logger:", "experiment:", "debug:"):
        assert group in result.out
    assert result.out.count("python train.py") >= 6
    assert max(map(len, result.out.splitlines())) <= 120
    assert list(workplace.iterdir()) == []


def test_the_composed_config_can_be_shown(command: Command, workplace: Path) -> None:
    result = command("+experiment=quickstart", "--cfg", "job")
    assert result.code == 0
    assert "latency: 0.5" in result.out
    assert list(workplace.iterdir()) == []


def test_a_mistake_beside_help_has_no_traceback(command: Command) -> None:
    result = command("+experiment=nope", "--help")
    assert result.code == 2
    assert "quickstart" in result.err
    assert "Traceback" not in result.err


def test_asking_for_help_does_not_import_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['train.py', '--help']\n"
        "from adaptrain.app.train import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'pytorch_lightning', 'transformers', 'rich') if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_same_command(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "adaptrain"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert "python -m adaptrain +experiment=quickstart" in result.stdout


def test_the_script_is_the_same_command(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py")], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert "python train.py +experiment=quickstart" in result.stdout


def test_threads_wait_instead_of_spin_unless_the_user_says_otherwise(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, spins in (({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")):
        with monkeypatch.context() as environment:
            for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
                environment.setenv(name, "")
                environment.delenv(name)
            for name, value in given.items():
                environment.setenv(name, value)
            command("--help")
            assert os.environ.get("GOMP_SPINCOUNT") == spins
