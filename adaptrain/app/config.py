"""Where the configs are, and what is checked in a composed one before anything is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from adaptrain.budget import Budget
from adaptrain.errors import ConfigurationError

# What the text modules log, by task; the first is the task's own metric.
METRICS = {
    "classification": ("val/accuracy", "val/loss", "train/loss", "test/accuracy", "test/loss"),
    "language_model": ("val/perplexity", "val/loss", "train/loss", "test/perplexity", "test/loss"),
}
SMALLER_IS_BETTER = ("loss", "perplexity")


def config_dir() -> Path:
    """Returns the folder of configs: inside the package in a wheel, at the top of a source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def experiments() -> dict[str, str]:
    """Returns the experiments there are, each with the first comment of its file that describes it."""
    found = {}
    for path in sorted((config_dir() / "experiment").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line]
        found[path.stem] = comments[0] if comments else ""
    return found


def check(cfg: DictConfig) -> Budget:
    """Refuses what can be seen to be wrong before anything is loaded or built.

    Args:
        cfg: The composed config.

    Returns:
        The budget.

    Raises:
        ConfigurationError: A value that cannot be served.
        omegaconf.errors.OmegaConfBaseException: A value is missing or refers to nothing.
    """
    budget = Budget(**as_dict(cfg.budget))
    if not isinstance(cfg.seed, int) or isinstance(cfg.seed, bool) or not 0 <= cfg.seed < 2**32:
        raise ConfigurationError(f"seed must be an integer from 0 to 4294967295, got {cfg.seed!r}.")
    name = cfg.experiment_name
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or set(name) == {"."}:
        raise ConfigurationError(
            f"experiment_name names a folder: letters, digits, '_', '-' and '.' only, got {name!r}."
        )
    trainer = cfg.trainer
    unlimited = trainer.get("max_steps", -1) in (-1, None) and trainer.get("max_epochs") in (-1, None)
    if unlimited and budget.wall_clock_min is None and not trainer.get("fast_dev_run"):
        raise ConfigurationError(
            "Nothing ends this run. Set trainer.max_steps=<n>, trainer.max_epochs=<n> or budget.wall_clock_min=<m>."
        )
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return budget


def as_dict(cfg: Any) -> dict[str, Any]:
    """Returns a config node as plain Python, interpolations resolved."""
    plain = as_plain(cfg)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def as_plain(node: Any) -> Any:
    """Returns a config value as plain Python, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def metric_of(task: str) -> tuple[str, str]:
    """Returns a task's metric and whether `"max"` or `"min"` of it is best."""
    name = METRICS[task][0]
    return name, mode_of(name)


def mode_of(metric: str) -> str:
    """Returns `"min"` for losses and perplexities, `"max"` for the rest."""
    return "min" if metric.endswith(SMALLER_IS_BETTER) else "max"


def check_optimized_metric(name: str | None, task: str, model_target: str) -> str:
    """Returns the metric a job returns; refuses a name that adaptrain's own modules do not log.

    Args:
        name: What `optimized_metric` says; None for the task's metric.
        task: `"classification"` or `"language_model"`.
        model_target: The module's `_target_`; one that is not adaptrain's may log anything.

    Raises:
        ConfigurationError: There is no such metric.
    """
    if name is None:
        return METRICS[task][0]
    if model_target.startswith("adaptrain.") and name not in METRICS[task]:
        raise unknown_metric(name, METRICS[task])
    return name


def unknown_metric(name: str, known: Any) -> ConfigurationError:
    """The refusal of a metric that is not logged."""
    return ConfigurationError(f"optimized_metric={name} is not logged. There are: {', '.join(sorted(known))}.")
