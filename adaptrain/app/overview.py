"""What the command says about itself: the experiments there are, and names near a mistyped one."""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from adaptrain.app.config import config_dir, experiments

_WIDTH = 120


def program() -> str:
    """Returns the command as the user typed it, for examples that can be copied."""
    script = Path(sys.argv[0]).name
    if script == "__main__.py":
        return "python -m adaptrain"
    return f"python {script}" if script.endswith(".py") else script


@contextlib.contextmanager
def folded(arguments: Sequence[str]) -> Iterator[None]:
    """Breaks long lines of the help: Hydra lists the options of a group in one line, however many there are.

    Args:
        arguments: The command line; nothing is done where it does not ask for help.
    """
    if not {"--help", "-h"} & set(arguments):
        yield
        return
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        for line in text.getvalue().splitlines():
            print(textwrap.fill(line, _WIDTH, subsequent_indent="    ", drop_whitespace=False) if line else "")  # noqa: T201


def experiments_text() -> str:
    """Returns the experiments there are and how to start one."""
    found = experiments()
    width = max(map(len, found))
    lines = [f"  {name:<{width}}  {description}" for name, description in found.items()]
    first = "quickstart" if "quickstart" in found else next(iter(found))
    return "\n".join(
        [
            "adaptrain trains a text model within a budget. Choose an experiment:",
            "",
            *lines,
            "",
            f"Start one:   {program()} +experiment={first}",
            f"Less of it:  {program()} +experiment={first} +debug=limit",
            f"Everything:  {program()} --help",
        ]
    )


def near_keys(overrides: Sequence[str]) -> list[str]:
    """Returns, for each override whose key does not exist, the keys that are spelled nearly the same.

    Args:
        overrides: The command's overrides.
    """
    cfg = _compose([item for item in overrides if item.startswith("+") or "." not in item.partition("=")[0]])
    if cfg is None:
        return []
    known = list(_keys("", OmegaConf.to_container(cfg, resolve=False)))
    hints = []
    for override in overrides:
        key = override.partition("=")[0]
        if override[0] in "+~" or key in known or key.startswith("hydra"):
            continue
        if near := difflib.get_close_matches(key, known, n=3, cutoff=0.75):
            hints.append(f"Near {key}: {', '.join(near)}")
    return hints


def _compose(overrides: Sequence[str]) -> DictConfig | None:
    from hydra import compose, initialize_config_dir

    groups = {path.name for path in config_dir().iterdir() if path.is_dir()}
    chosen = [item for item in overrides if item.lstrip("+~").partition("=")[0] in groups]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            return compose("train", chosen)
        except Exception:  # the hint is an extra: Hydra has already said what is wrong
            return None


def _keys(prefix: str, node: Any) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        name = f"{prefix}{key}"
        yield name
        yield from _keys(f"{name}.", value)
