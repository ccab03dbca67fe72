"""How much each micro-batch counts in the loss of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaptrain.errors import ConfigurationError
from adaptrain.execution.split import IGNORED, leaves

WeightBy = str | Callable[[Any], float]


def sample_weights(batch: Any, size: int, weight_by: str) -> list[float]:
    """Returns how much each sample counts in a loss that is a mean.

    * `"samples"`: every sample counts 1.
    * `"tokens"`: its labels that are not -100; without labels, its attention mask.
    * `"auto"`: its labels that are not -100 where there are integer labels, else 1. Where no label is ignored, that
      is the same as by samples.

    Labels that repeat `input_ids` are a causal language model's: the model shifts them by one and never predicts the
    first token, so that the first column does not count.

    Args:
        batch: The whole batch.
        size: Its samples.
        weight_by: `"auto"`, `"samples"` or `"tokens"`.

    Returns:
        One number per sample.

    Raises:
        ConfigurationError: `"tokens"` for a batch with neither integer labels nor an attention mask.
    """
    if weight_by == "samples":
        return [1.0] * size
    labels = _find(batch, "labels")
    if labels is not None and labels.ndim and labels.shape[0] == size and not labels.is_floating_point():
        counted = labels != IGNORED
        ids = _find(batch, "input_ids")
        if ids is not None and ids.ndim >= 2 and ids.shape == labels.shape and _repeats(ids, labels, counted):
            counted = counted[:, 1:]
        return counted.reshape(size, -1).sum(1).tolist()
    if weight_by == "auto":
        return [1.0] * size
    mask = _find(batch, "attention_mask")
    if mask is None or mask.shape[0] != size:
        raise ConfigurationError(
            "weight_by='tokens' needs `labels` (integers, -100 where ignored) or an `attention_mask` in the batch, but"
            f" it has {_names(batch)}. Use weight_by='samples', or a callable that returns a micro-batch's weight."
        )
    return (mask != 0).reshape(size, -1).sum(1).tolist()


def _repeats(ids: Tensor, labels: Tensor, counted: Tensor) -> bool:
    return bool(torch.where(counted, labels == ids, True).all())


def _find(batch: Any, name: str) -> Tensor | None:
    found = [(len(path), leaf) for leaf, path in leaves(batch) if path[-1:] == (name,) and isinstance(leaf, Tensor)]
    return min(found, key=lambda each: each[0])[1] if found else None


def _names(batch: Any) -> str:
    names = [str(path[-1]) for _, path in leaves(batch) if path and isinstance(path[-1], str)]
    return ", ".join(names) or f"a {type(batch).__name__}"
