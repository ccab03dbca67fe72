"""What an installed adaptrain offers: its configs, to its own command and to other Hydra applications."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from adaptrain.app.config import config_dir

ROOT = Path(__file__).parents[2]
OTHER_APP = """
import hydra
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path="conf", config_name="main")
def main(cfg):
    import adaptrain
    print(adaptrain.__file__)
    print(cfg.callbacks.learning_rate._target_, cfg.budget.latency, cfg.mine)

main()
"""
OTHER_CONF = """
defaults:
  - callbacks: default
  - budget: default
  - _self_
mine: 1
report: {latency_input: [1, 8]}
hydra: {run: {dir: .}, output_subdir: null}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        check=True,
        timeout=120,
    )
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents, found before the source tree that this environment has installed."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _run(arguments: list[str], *, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH comes before the source tree of an editable install.
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
def test_the_wheel_holds_every_config(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in config_dir().rglob("*.yaml"):
        assert f"adaptrain/conf/{path.relative_to(config_dir())}" in names
    assert "hydra_plugins/adaptrain_searchpath.py" in names
    assert "hydra_plugins/__init__.py" not in names  # a namespace that other packages share
    assert "adaptrain/py.typed" in names


@pytest.mark.slow
def test_another_application_composes_our_groups(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "main.yaml").write_text(OTHER_CONF)
    (tmp_path / "app.py").write_text(OTHER_APP)
    result = _run(["app.py", "budget.latency=0.5"], site=installed, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(str(installed))
    assert lines[1] == "adaptrain.LearningRateController 0.5 1"


@pytest.mark.slow
def test_the_installed_command_trains_outside_the_repository(installed: Path, tiny: list[str], tmp_path: Path) -> None:
    listed = _run(["-m", "adaptrain"], site=installed, cwd=tmp_path)
    assert "quickstart" in listed.stdout
    result = _run(["-m", "adaptrain", *tiny, "budget.params=0.8"], site=installed, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.glob("runs/*/*")
    assert (folder / "report.html").exists()


def test_in_the_source_tree_the_configs_are_at_the_top() -> None:
    assert config_dir() == ROOT / "conf"
    assert (config_dir() / "train.yaml").is_file()
