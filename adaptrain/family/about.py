"""What the members of a family have in common: the task, its labels, and the shapes that are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaptrain.errors import ConfigurationError
from adaptrain.execution.distillation import is_causal
from adaptrain.pruning.families import Match


def describe(match: Match, shapes: Mapping[str, tuple[int, int]], *, data: Any, device: torch.device) -> dict[str, Any]:
    """Returns what is known of a family before it has members, as plain Python.

    Args:
        match: The model.
        shapes: The shapes to measure at, by name.
        data: The data module, whose `max_length` counts; None, or one without: the model's positions.
        device: Where it trains.
    """
    config = getattr(match.model, "config", None)
    named = getattr(config, "id2label", None) or {}
    task = "language_model" if config is not None and is_causal(match.model) else "classification"
    longest = getattr(data, "max_length", None) or getattr(config, "max_position_embeddings", None)
    return {
        "task": task,
        "labels": [str(named[index]) for index in sorted(named)] if task == "classification" else [],
        "max_length": longest or max(length for _, length in shapes.values()),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "device_type": device.type,
    }


def find_tokenizer(*owners: Any) -> Any | None:
    """Returns the first tokenizer that can be saved, of a data module or a module; None where there is none."""
    for owner in owners:
        tokenizer = getattr(owner, "tokenizer", None)
        if hasattr(tokenizer, "save_pretrained"):
            return tokenizer
    return None


def with_single(shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Returns a shape and the one of a single sample, by name."""
    return {"batch": shape, "single": (1, shape[1])} if shape[0] > 1 else {"single": shape}


def read_shapes(given: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Returns the shapes to measure at, by name.

    Args:
        given: One (batch, sequence), or several by name.

    Raises:
        ConfigurationError: One is no such shape.
    """
    named = dict(given) if isinstance(given, Mapping) else {"batch": given}
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in named.items():
        values = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else (shape,)
        if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
            raise ConfigurationError(
                f"latency_input must be (batch, sequence), two whole numbers of at least 1, or such by name,"
                f" got {given!r}."
            )
        shapes[str(name)] = values
    if not shapes:
        raise ConfigurationError(f"latency_input names no shape: got {given!r}. Give (batch, sequence).")
    return shapes if isinstance(given, Mapping) else with_single(shapes["batch"])
