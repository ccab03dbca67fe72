"""The models to fuse, wherever they are, and whether they go together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.compression import structured
from adaptrain.errors import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.checkpoint import CHECKPOINT_KEY
from adaptrain.pruning.families import find_family

Given = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A model, a state dict, a checkpoint (.ckpt, .pt, .safetensors), or a folder of Hugging Face or of `export`."""


@dataclass(frozen=True)
class Source:
    """One of the models to fuse.

    Args:
        name: What it is called in messages.
        state: Its weights and buffers by name.
        module: The model, where there is one.
        structure: The record of what was cut out of it; None where nothing was.
    """

    name: str
    state: Mapping[str, Tensor]
    module: nn.Module | None
    structure: Mapping[str, Any] | None


def read(given: Given, name: str) -> Source:
    """Finds a model's weights; nothing is copied.

    Args:
        given: The model.
        name: What to call it where it has no path.

    Raises:
        ConfigurationError: There is nothing of a known form there.
    """
    if isinstance(given, nn.Module):
        return Source(f"{name} ({type(given).__name__})", given.state_dict(), given, _structure_of(given))
    if isinstance(given, Mapping):
        if not given or not all(isinstance(value, Tensor) for value in given.values()):
            raise ConfigurationError(f"{name} must be a state dict, names with tensors, got other values or none.")
        return Source(name, given, None, None)
    path = Path(given)
    if path.is_dir():
        model = _load_folder(path)
        return Source(str(path), model.state_dict(), model, _structure_of(model))
    if not path.is_file():
        raise ConfigurationError(f"There is no {path}. Give a model, a state dict, a checkpoint or a folder.")
    return _read_file(path)


def check_compatible(sources: Sequence[Source]) -> None:
    """Refuses models that differ in more than the values of their weights.

    Raises:
        ConfigurationError: It names the first difference: a weight that one lacks, a shape, a dtype, what was cut out,
            or a value that is no weight and cannot be averaged.
    """
    first, *others = sources
    for other in others:
        for here, there in ((first, other), (other, first)):
            if missing := next((name for name in here.state if name not in there.state), None):
                raise ConfigurationError(
                    f"{first.name} and {other.name} are of different architectures: {there.name} has no {missing!r},"
                    f" which {here.name} has."
                )
        for name, tensor in first.state.items():
            twin = other.state[name]
            for what, mine, its in (
                ("shape", tuple(tensor.shape), tuple(twin.shape)),
                ("dtype", tensor.dtype, twin.dtype),
            ):
                if mine != its:
                    raise ConfigurationError(
                        f"{name!r} is of {what} {mine} in {first.name} and {its} in {other.name}. Only models that"
                        " differ in nothing but the values of their weights can be merged."
                    )
        if first.structure != other.structure:
            raise ConfigurationError(
                f"{first.name} and {other.name} were pruned in different ways: their units are not the same ones, even"
                " where the shapes agree. Merge models of one structure, or ask them together: Ensemble."
            )
        for name, tensor in first.state.items():
            counts = name.endswith("num_batches_tracked")  # says how much BatchNorm has seen
            if not tensor.is_floating_point() and not counts and not torch.equal(tensor.cpu(), other.state[name].cpu()):
                raise ConfigurationError(
                    f"{name!r} holds {tensor.dtype} values, which cannot be averaged, and they differ between"
                    f" {first.name} and {other.name}."
                )


def _structure_of(module: nn.Module) -> Mapping[str, Any] | None:
    return structures.record(find_family(module)) if any(map(structures.is_pruned, module.modules())) else None


def _load_folder(path: Path) -> Any:
    if (path / structured.STRUCTURE_FILE).is_file():
        return structured.load(path)
    if not (path / "config.json").is_file():
        raise ConfigurationError(
            f"{path} is no model's folder: it has neither config.json (Hugging Face) nor {structured.STRUCTURE_FILE}."
        )
    import transformers

    named = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    model_class = getattr(transformers, named[0], None)
    if model_class is None:
        raise ConfigurationError(
            f"{path / 'config.json'} names the architecture {named[0]!r}, which transformers {transformers.__version__}"
            " lacks."
        )
    return model_class.from_pretrained(str(path)).eval()


def _read_file(path: Path) -> Source:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return Source(str(path), load_file(str(path)), None, None)
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        raise ConfigurationError(f"{path} cannot be read as a checkpoint: {type(error).__name__}.") from error
    state = read.get("state_dict", read) if isinstance(read, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigurationError(f"{path} holds no weights: neither a 'state_dict' nor names with tensors.")
    return Source(str(path), state, None, read.get(CHECKPOINT_KEY))
