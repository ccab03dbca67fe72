"""A pruned model as it is: its weights, and the structure that says into which shapes they go."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adaptrain
from adaptrain.errors import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import Match
from adaptrain.pruning.surgery import resize

STRUCTURE_FILE = "structure.json"
WEIGHTS_FILE = "model.safetensors"


def save(match: Match, folder: Path) -> None:
    """Writes a model's weights (`model.safetensors`) and its structure and config (`structure.json`).

    Args:
        match: The model.
        folder: A folder that is there.
    """
    from safetensors.torch import save_model

    (folder / STRUCTURE_FILE).write_text(json.dumps(describe(match), indent=2) + "\n", encoding="utf-8")
    save_model(match.model, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def describe(match: Match) -> dict[str, Any]:
    """Returns what `rebuild` needs beside the weights: class, config, dtype and structure, as plain Python."""
    config = getattr(match.model, "config", None)
    of_transformers = type(match.model).__module__.startswith("transformers.")
    return {
        "adaptrain": adaptrain.__version__,
        "class": type(match.model).__name__,
        "dtype": str(next(match.model.parameters()).dtype).removeprefix("torch."),
        "structure": structures.record(match),
        # Of the dense model. Not in a config.json, which would promise that transformers alone can load this.
        "config": json.loads(config.to_json_string(use_diff=False)) if config is not None and of_transformers else None,
    }


def load(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> Any:
    """Loads what `export(..., layout="structured")` wrote.

    Args:
        path: The folder.
        model: A dense model to give the saved shapes and weights, for one that is not of transformers. None: a new one
            of the class and config that were saved.

    Returns:
        The model, on the CPU and in evaluation mode, in the shapes and the dtype it was exported with.

    Raises:
        ConfigurationError: The folder is no such export, or is of another architecture.
    """
    from safetensors.torch import load_model

    folder = Path(path)
    if not (folder / STRUCTURE_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        has_config = (folder / "config.json").is_file()
        hint = "It is a plain Hugging Face folder: load it with transformers." if has_config else "Give its folder."
        raise ConfigurationError(
            f"{folder} is no export with layout='structured': it needs {STRUCTURE_FILE} and {WEIGHTS_FILE}. {hint}"
        )
    described = json.loads((folder / STRUCTURE_FILE).read_text(encoding="utf-8"))
    built = rebuild(described, where=folder, model=model)
    load_model(find_family(built).model, str(folder / WEIGHTS_FILE))
    return built.eval()


def rebuild(described: Mapping[str, Any], *, where: Path, model: nn.Module | None = None) -> Any:
    """Returns a model of the shapes and the dtype that `describe` noted; its weights are yet to be loaded.

    Args:
        described: What `describe` returned.
        where: Where it is from, for messages.
        model: A dense model to give the shapes; None: a new one.

    Raises:
        ConfigurationError: The class cannot be built here, or `model` is of another architecture.
    """
    if model is None:
        model = _build(described, where)
    model.to(dtype=getattr(torch, described["dtype"]))
    match = find_family(model)
    structures.check_record(match, described["structure"])
    resize(match, structures.copy_of(described["structure"]["layers"]))
    return model


def _build(described: Mapping[str, Any], folder: Path) -> nn.Module:
    name, config = described["class"], described["config"]
    if config is None:
        raise ConfigurationError(
            f"{folder} holds a {name}, which is not of transformers: build it dense and give it, load(path, model=...)."
        )
    import transformers

    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ConfigurationError(f"{folder} holds a {name}, which transformers {transformers.__version__} lacks.")
    with torch.random.fork_rng(devices=[]):
        return model_class(model_class.config_class.from_dict(config))
