"""Going on with an interrupted run: which settings, from which checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from adaptrain.app import runs
from adaptrain.errors import ConfigurationError

log = logging.getLogger(__name__)

# What may change when a run goes on: it has no part in what the weights become.
FREE = ("resume", "runs_dir", "run_dir", "logger", "report", "optimized_metric")
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Resumed:
    """A run to go on with.

    Args:
        cfg: Its settings.
        folder: Its folder.
        checkpoint: The newest checkpoint that is whole.
        step: The optimizer step of that checkpoint.
    """

    cfg: DictConfig
    folder: Path
    checkpoint: Path
    step: int


def find(cfg: DictConfig, overrides: Sequence[str]) -> Resumed:
    """Finds what `resume=<run dir>` asks for.

    Args:
        cfg: The config composed from this command.
        overrides: The command's overrides. With `resume` alone, and what is free to change, the run's own settings
            are taken; with others they must come to the same settings.

    Raises:
        ConfigurationError: The folder is no run, is finished, has no usable checkpoint, or has other settings.
    """
    folder = Path(str(cfg.resume))
    saved = _saved_config(folder)
    sections = {_section(override) for override in overrides}
    if sections <= set(FREE):
        for section in sections:
            OmegaConf.update(saved, section, cfg[section], merge=False, force_add=True)
    else:
        _compare(saved, cfg, folder)
        saved = cfg
    if (folder / SUMMARY_FILE).exists():
        raise ConfigurationError(
            f"The run {folder} is finished: it has a {SUMMARY_FILE}. There is nothing to resume; start a new run"
            " without resume=."
        )
    checkpoint, step = newest_checkpoint(folder)
    return Resumed(cfg=saved, folder=folder, checkpoint=checkpoint, step=step)


def newest_checkpoint(folder: Path) -> tuple[Path, int]:
    """Returns the checkpoint of the most steps that can be read, and its step.

    Raises:
        ConfigurationError: There is none.
    """
    found = []
    for path in sorted((folder / runs.CHECKPOINTS).glob("*.ckpt")):
        try:
            found.append((_step_of(path), path.name == "last.ckpt", path))
        except Exception as error:  # whatever a damaged file makes torch raise
            log.warning("The checkpoint %s cannot be read and is passed over: %s", path, _first_line(error))
    if not found:
        raise ConfigurationError(
            f"The run {folder} has no checkpoint to resume from in {folder / runs.CHECKPOINTS}: it ended before the"
            " first was written, or none is whole. Start it again without resume=."
        )
    step, _, path = max(found)
    return path, step


def is_resumable(folder: Path) -> bool:
    """Whether a run has a checkpoint and is not finished."""
    return not (folder / SUMMARY_FILE).exists() and any((folder / runs.CHECKPOINTS).glob("*.ckpt"))


def _saved_config(folder: Path) -> DictConfig:
    path = folder / runs.CONFIG_FILE
    if not folder.is_dir():
        raise ConfigurationError(f"resume={folder}: there is no such folder. Give the folder of a run: runs/*/*.")
    if not path.is_file():
        raise ConfigurationError(
            f"resume={folder}: that is no run, it has no {runs.CONFIG_FILE}. Give the folder of a run: runs/*/*."
        )
    saved = OmegaConf.load(path)
    if not isinstance(saved, DictConfig):
        raise ConfigurationError(f"{path} is not the config of a run. Start it again without resume=.")
    return saved


def _section(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]


def _compare(saved: DictConfig, composed: DictConfig, folder: Path) -> None:
    old, new = dict(_settings(saved)), dict(_settings(composed))
    absent = "(absent)"
    differing = [
        f"  {key}: {old.get(key, absent)!r} in the run, {new.get(key, absent)!r} now"
        for key in sorted({*old, *new})
        if old.get(key, absent) != new.get(key, absent)
    ]
    if differing:
        more = f"\n  and {len(differing) - 10} more" if len(differing) > 10 else ""
        raise ConfigurationError(
            f"resume={folder}: that run has other settings than this command:\n"
            + "\n".join(differing[:10])
            + more
            + f"\nresume={folder} alone takes the settings of the run."
        )


def _settings(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    for key, value in plain.items():
        if key not in FREE:
            yield from _flat(key, value)


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(f"{key}.{name}", item)
    else:
        yield key, value


def _step_of(path: Path) -> int:
    import torch

    # Mapped, not read: only the directory of the file and the step are looked at.
    return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
