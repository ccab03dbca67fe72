"""From config to objects: the one place where `_target_`s are called."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from adaptrain.app.errors import built_from
from adaptrain.errors import ConfigurationError


def build(node: Any, key: str, **kwargs: Any) -> Any:
    """Builds what a config node describes.

    Args:
        node: The node, with a `_target_`.
        key: Where it stands in the config, for messages.
        **kwargs: Objects to pass beside the node's values.

    Raises:
        ConfigurationError: The constructor refuses a value, does not know an argument, or needs a missing package.
    """
    with built_from(key):
        # Partial first: Hydra would copy the objects in kwargs into a config.
        factory = instantiate(node, _partial_=True, _convert_="all")
        return factory(**kwargs)


def build_each(nodes: DictConfig | None, key: str) -> dict[str, Any]:
    """Builds every entry of a group by name.

    An entry that is null, or without a `_target_`, builds nothing: an experiment may set a value of a callback that
    `callbacks=none` leaves out.

    Raises:
        ConfigurationError: An entry is a plain value, or as for `build`.
    """
    built = {}
    for name, node in (nodes or {}).items():
        if node is not None and not OmegaConf.is_dict(node):
            raise ConfigurationError(
                f"{key}.{name} must be settings with a _target_, or null to leave it out; got {node!r}."
            )
        if node is not None and "_target_" in node:
            built[str(name)] = build(node, f"{key}.{name}")
    return built


def build_callbacks(cfg: DictConfig) -> tuple[dict[str, Any], list[Any]]:
    """Builds the callbacks.

    Returns:
        All of them by name, and in the order the trainer calls them: the clock first, since schedules read it.
    """
    named = build_each(cfg.essentials, "essentials") | build_each(cfg.callbacks, "callbacks")
    if not cfg.trainer.get("enable_progress_bar", True):
        named.pop("progress_bar", None)  # Lightning refuses the two together
    return named, [named[name] for name in sorted(named, key=lambda name: name != "wall_clock")]


def build_trainer(cfg: DictConfig, callbacks: list[Any]) -> Any:
    """Builds the loggers and the trainer."""
    loggers = list(build_each(cfg.logger, "logger").values())
    return build(
        cfg.trainer,
        "trainer",
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing=any(type(callback).__name__ == "ModelCheckpoint" for callback in callbacks),
    )
