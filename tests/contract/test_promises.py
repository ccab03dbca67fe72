"""The promises every callback keeps."""

from __future__ import annotations

import functools
import inspect
import json
import pickle
import pkgutil
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning_pl
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

import adaptrain
import adaptrain.callbacks
from adaptrain import _lightning
from tests.contract.runs import STEPS, fit
from tests.contract.settings import SETTINGS, Setting
from tests.processes import run_python, run_ranks
from tests.toys import TextModule

ROOT = Path(__file__).parents[2]
each = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
deciders = pytest.mark.parametrize(
    "setting", [s for s in SETTINGS.values() if s.has_dry_run], ids=[n for n, s in SETTINGS.items() if s.has_dry_run]
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setting], tuple[dict[str, Any], Path]]:
    """Each callback's uninterrupted run, and the folder it left; trained once, by the first test that asks."""

    @functools.cache
    def run(name: str) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp(name)
        return fit(folder, [SETTINGS[name].build()]), folder

    return lambda setting: run(setting.name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run without any callback of ours."""
    return fit(tmp_path_factory.mktemp("plain"), [])


def test_every_callback_is_under_contract():
    found = set()
    for module_info in pkgutil.iter_modules(adaptrain.callbacks.__path__):
        module = import_module(f"adaptrain.callbacks.{module_info.name}")
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, _lightning.Callback) and kind.__module__ == module.__name__:
                found.add(name)
    assert found - {"AdaptiveCallback"} == set(SETTINGS)
    assert {s.yaml for s in SETTINGS.values()} <= {path.stem for path in (ROOT / "conf" / "callbacks").glob("*.yaml")}


@each
def test_its_yaml_names_it_and_every_argument(setting: Setting):
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "callbacks" / f"{setting.yaml}.yaml"))
    assert isinstance(config, dict)
    assert list(config) == [setting.yaml]
    node = config[setting.yaml]
    assert node.pop("_target_") == f"adaptrain.{setting.name}"
    parameters = inspect.signature(getattr(adaptrain, setting.name)).parameters
    assert set(node) <= set(parameters)
    assert set(parameters) - set(node) <= {"name", "split"}, "every argument stands in the YAML"
    text = (ROOT / "conf" / "callbacks" / f"{setting.yaml}.yaml").read_text()
    for key in node:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
        index = text.splitlines().index(line)
        assert "#" in line or text.splitlines()[index - 1].strip().startswith("#"), f"{key} has no comment"


@each
def test_it_pickles(setting: Setting):
    copy = pickle.loads(pickle.dumps(setting.build()))
    assert type(copy).__name__ == setting.name


@each
def test_it_acts(setting: Setting, whole):
    result, _ = whole(setting)
    assert result["step"] == STEPS
    assert setting.knobs <= {d["knob"] for d in result["decisions"] if d["applied"]}
    for decision in result["decisions"]:
        assert decision["reason"].strip()
        assert decision["source"] == setting.name


@each
def test_it_works_in_the_other_namespace(setting: Setting, whole, tmp_path):
    class Module(lightning_pl.LightningModule):
        training_step = TextModule.training_step
        configure_optimizers = TextModule.configure_optimizers
        on_train_batch_end = TextModule.on_train_batch_end

    source, module = TextModule(), Module()
    module.model, module.lr, module.optimizer_name, module.losses = source.model, 1e-2, "AdamW", []
    other = fit(tmp_path, [setting.build()], namespace=lightning_pl, module=module)
    assert other["losses"] == whole(setting)[0]["losses"]


@deciders
def test_a_dry_run_changes_nothing(setting: Setting, plain, tmp_path):
    result = fit(tmp_path, [setting.build(dry_run=True)])
    assert result["weights"] == plain["weights"]
    assert result["losses"] == plain["losses"]
    assert not any(d["applied"] for d in result["decisions"])
    assert setting.knobs <= {d["knob"] for d in result["decisions"]}


@each
def test_killed_and_resumed_equals_uninterrupted(setting: Setting, whole, tmp_path):
    uninterrupted, _ = whole(setting)
    killed = run_python("-m", "tests.contract.runs", "kill", tmp_path, "--name", setting.name)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = fit(tmp_path, [setting.build()], resume=True)
    assert resumed["step"] == STEPS
    assert resumed["losses"] == uninterrupted["losses"][8:]
    assert resumed["weights"] == uninterrupted["weights"]
    assert [(d["step"], d["knob"], d["new"]) for d in resumed["decisions"]] == [
        (d["step"], d["knob"], d["new"]) for d in uninterrupted["decisions"]
    ]


@each
def test_its_state_is_plain(setting: Setting, whole):
    _, folder = whole(setting)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["callbacks"].get(setting.build().state_key, {})
    json.dumps(state)


@each
def test_wrong_arguments_are_refused_before_training(setting: Setting):
    for arguments, message in setting.wrong:
        with pytest.raises(adaptrain.ConfigurationError, match=message) as caught:
            setting.build(**arguments)
        value = next(iter(arguments.values()))
        seen = str(next(iter(value.values()))) if isinstance(value, dict) else str(value)
        assert seen.strip("()'") in str(caught.value) or "wheels" in str(caught.value) or "speed" in str(caught.value)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every callback's run on two real gloo processes, one result a rank."""
    folder = tmp_path_factory.mktemp("ddp")
    for done in run_ranks("tests.contract.runs", "ddp", folder):
        assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@each
def test_two_ranks_agree(setting: Setting, ranks):
    first, second = (rank[setting.name] for rank in ranks)
    assert first["weights"] == second["weights"]
    assert first["step"] == STEPS
    assert [d["new"] for d in first["decisions"]] == [d["new"] for d in second["decisions"]]
    assert setting.knobs <= {d["knob"] for d in first["decisions"]}


def test_both_namespaces_are_installed_for_these_tests():
    assert {base.__module__.split(".")[0] for base in _lightning.Callback.__bases__} == {
        "pytorch_lightning",
        "lightning",
    }
    assert issubclass(_lightning.Callback, pl.Callback)
