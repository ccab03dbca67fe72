"""A run's folder: where it is, and the facts written into it."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import adaptrain
from adaptrain.app.lock import LOCK_FILE
from adaptrain.errors import ConfigurationError

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
FACTS = ("versions", "hardware")
LOG_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] %(message)s"

# Set by rank zero, so that the processes it starts use the same folder.
FOLDER_VARIABLE = "ADAPTRAIN_RUN_DIR"


def is_rank_zero() -> bool:
    """Whether this process writes the run's files: known before there is a trainer, from what launchers set."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return True


def choose(cfg: DictConfig, *, sweep_job: str | None) -> Path:
    """Returns the folder of a new run; one that is named by the time is made, so that no other run takes it.

    Args:
        cfg: The config.
        sweep_job: The folder Hydra gave a job of a sweep, or None.

    Raises:
        ConfigurationError: `run_dir` names a folder that holds something, or one for all jobs of a sweep.
    """
    if not is_rank_zero() and FOLDER_VARIABLE in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    if cfg.run_dir is not None:
        return _named(Path(str(cfg.run_dir)).expanduser(), sweep_job)
    if sweep_job is not None:
        return Path(sweep_job)
    folder = Path(cfg.runs_dir) / cfg.experiment_name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return claim(folder) if is_rank_zero() else folder


def claim(wanted: Path) -> Path:
    """Makes a folder of that name, numbered where there is one: several runs may start in the same second."""
    number, folder = 1, wanted
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}_{number}")
        else:
            return folder


def _named(folder: Path, sweep_job: str | None) -> Path:
    if sweep_job is not None:
        raise ConfigurationError(
            f"run_dir={folder} names one folder, and every job of a sweep has its own. Leave it out; hydra.sweep.dir"
            " says where they all go."
        )
    if folder.exists() and not (folder.is_dir() and all(path.name == LOCK_FILE for path in folder.iterdir())):
        raise ConfigurationError(
            f"run_dir={folder} is there and not an empty folder. To go on with its run: resume={folder}."
            " For a new one name another folder."
        )
    return folder


def create(folder: Path, cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Makes the folder of a new run and writes what it is: config, overrides, versions, hardware.

    Returns:
        `{"versions": ..., "hardware": ...}`.
    """
    facts = {"versions": versions(), "hardware": hardware()}
    os.environ[FOLDER_VARIABLE] = str(folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
    (folder / "overrides.yaml").write_text(OmegaConf.to_yaml(list(overrides)), encoding="utf-8")
    for name, values in facts.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return facts


def is_begun(folder: Path) -> bool:
    """Whether `create` has written into it."""
    return (folder / CONFIG_FILE).exists()


def read_facts(folder: Path) -> dict[str, Any]:
    """Reads what `create` wrote of versions and hardware."""
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in FACTS}


def discard(folder: Path) -> None:
    """Removes the folder of a run that was refused, and the folders above it that are empty without it."""
    shutil.rmtree(folder, ignore_errors=True)
    remove_empty(folder.parent)


def remove_empty(folder: Path) -> None:
    """Removes a folder of runs and its parent where they are empty."""
    for candidate in (folder, folder.parent):
        if candidate.is_dir() and candidate.resolve() != Path.cwd() and not any(candidate.iterdir()):
            candidate.rmdir()


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Copies log messages to train.log in the run's folder, and what ends the body early; on rank zero."""
    if not is_rank_zero():
        yield
        return
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    handler.handleError = lambda record: None  # a full disk: what ends the run says so once
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:
        record = {"name": __name__, "levelno": logging.ERROR, "levelname": "ERROR", "msg": f"ended early: {error!r}"}
        unexpected = isinstance(error, Exception) and not isinstance(error, ConfigurationError)
        handler.handle(logging.makeLogRecord(record | {"exc_info": sys.exc_info() if unexpected else None}))
        raise
    finally:
        root.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def versions() -> dict[str, str | None]:
    """Returns the versions of what computes, and the commit of the folder the command is run in."""
    found: dict[str, str | None] = {"adaptrain": adaptrain.__version__, "python": platform.python_version()}
    for package in ("torch", "pytorch-lightning", "transformers", "tokenizers", "hydra-core"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["git_commit"] = _git_commit()
    return found


def hardware() -> dict[str, Any]:
    """Returns the machine: platform, CPU model, usable cores, RAM in GiB, GPUs."""
    import psutil
    import torch

    from adaptrain.resources.device import cpu_model

    cuda = torch.cuda.is_available()
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
    }


def _git_commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
