"""Every YAML composes, and what it describes can be built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import adaptrain
from adaptrain.app import build
from adaptrain.app.config import config_dir, experiments
from adaptrain.budget import Budget

CONF = config_dir()
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
GROUPS = sorted({str(path.parent) for path in FILES} - {"."})


@pytest.fixture(autouse=True)
def _configs() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def options(group: str) -> list[str]:
    return [path.stem for path in FILES if str(path.parent) == group]


def composed(*overrides: str) -> DictConfig:
    return compose("train", list(overrides))


def choice(group: str, option: str) -> str:
    return f"+{group}={option}" if group in ("experiment", "debug") else f"{group}={option}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != Path()], ids=str)
def test_every_yaml_composes(path: Path) -> None:
    cfg = compose("train", [choice(str(path.parent), path.stem)], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    del cfg.hydra
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_yaml_says_what_it_is_for(path: Path) -> None:
    lines = (CONF / path).read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines[:3] if line.startswith("# ") and "@package" not in line]
    assert comments, f"{path} begins without a comment"
    assert all(len(line) <= 160 for line in lines)


@pytest.mark.parametrize("name", [name for name in options("callbacks") if name not in ("default", "none")])
def test_every_callback_builds(name: str) -> None:
    cfg = composed("callbacks=none", f"+callbacks@mine={name}", "budget.params=0.5")
    built = build.build_each(cfg.mine, "callbacks")
    assert list(built) == [name]


@pytest.mark.parametrize("option", options("trainer"))
def test_every_trainer_builds(option: str, tmp_path: Path) -> None:
    accelerator = [] if option == "gpu" else ["trainer.accelerator=cpu"]
    cfg = composed(f"trainer={option}", *accelerator, "logger=none", "callbacks=none", f"run_dir={tmp_path}")
    if option == "gpu":
        import torch

        if not torch.cuda.is_available():
            with pytest.raises(adaptrain.ConfigurationError, match="trainer"):
                build.build_trainer(cfg, [])
            return
    assert build.build_trainer(cfg, []).default_root_dir == str(tmp_path)


@pytest.mark.parametrize("option", options("model"))
def test_every_model_has_a_constructor_that_knows_its_arguments(option: str) -> None:
    from inspect import signature

    from hydra.utils import get_class

    cfg = composed(f"model={option}").model
    known = signature(get_class(cfg._target_).__init__).parameters
    given = {str(key) for key in cfg} - {"_target_", "_partial_"}
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    assert accepts_any or given <= set(known)


@pytest.mark.parametrize("option", options("data"))
def test_every_data_module_builds(option: str) -> None:
    # Built, not prepared: that would read the corpus or ask the hub.
    own = ["data.train_file=texts.csv"] if option == "files" else []
    data = build.build(composed(f"data={option}", *own).data, "data")
    assert data.task in ("classification", "language_model")


def test_the_budget_has_every_field_and_no_limit() -> None:
    assert OmegaConf.to_container(composed().budget) == Budget().asdict()


def test_without_adaptation_a_run_can_still_be_resumed() -> None:
    cfg = composed("callbacks=none", "+experiment=quickstart", "run_dir=here")
    named, ordered = build.build_callbacks(cfg)
    assert set(named) == {"wall_clock", "random_state", "graceful_stop", "checkpoint", "progress_bar"}
    assert ordered[0] is named["wall_clock"]


def test_a_callback_can_be_left_out() -> None:
    cfg = composed("~callbacks.pruning", "callbacks.monitor=null", "run_dir=here")
    named, _ = build.build_callbacks(cfg)
    assert "learning_rate" in named
    assert not {"pruning", "monitor"} & set(named)


def test_every_experiment_names_itself_and_is_described() -> None:
    assert {"quickstart", "language_model", "sst2"} <= set(experiments())
    for name, description in experiments().items():
        assert composed(f"+experiment={name}").experiment_name == name
        assert description.endswith(".")


@pytest.mark.parametrize("name", ["quickstart", "language_model"])
def test_the_dense_model_is_validated_before_the_first_event(name: str) -> None:
    cfg = composed(f"+experiment={name}")
    assert cfg.trainer.val_check_interval <= cfg.callbacks.pruning.schedule.begin * cfg.trainer.max_steps


def test_every_value_of_a_group_is_commented() -> None:
    for group in ("budget", "trainer", "essentials", "logger", "experiment"):
        for option in options(group):
            for line in (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines():
                if _is_plain_value(line) and group not in ("essentials", "logger", "experiment"):
                    assert "#" in line, f"{group}/{option}.yaml: {line}"


def _is_plain_value(line: str) -> bool:
    known: Any = ("_target_", "- ", "defaults:", "accelerator: ", "strategy: ")
    return bool(re.match(r"\s*[a-z_]+: \S", line)) and not line.strip().startswith(known)
