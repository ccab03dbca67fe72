"""The shape of the batches that training data comes in, found without disturbing it."""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrain.errors import ConfigurationError

_BATCHES = 8
_HINT = "Say the shape to measure at: latency_input=(batch, sequence), for example (32, 128)."


def typical_shape(loader: Any) -> tuple[int, int]:
    """Returns the median (batch, sequence) of a few batches that a loader would make.

    Args:
        loader: A `torch.utils.data.DataLoader` over a map-style dataset.

    Returns:
        The loader's batch size, and the median of the padded lengths in tokens.

    Raises:
        ConfigurationError: The loader is of another kind, or its batches hold no token ids.
    """
    batches = sample_batches(loader, _BATCHES, hint=_HINT)
    return _batch_size(loader) or 1, round(statistics.median(map(_length, batches)))


def sample_batches(loader: Any, count: int, *, size: int | None = None, hint: str) -> list[Any]:
    """Returns batches that a loader would make, without disturbing it.

    They are collated from samples spread evenly over the dataset; the loader itself is not iterated, and the random
    state is put back, so training sees the same batches as without this.

    Args:
        loader: A `torch.utils.data.DataLoader` over a map-style dataset.
        count: How many at most; small data has fewer.
        size: Samples in each at most; None: the loader's batch size.
        hint: What to do where the loader is of another kind.

    Raises:
        ConfigurationError: The loader is of another kind.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate: Any = getattr(loader, "collate_fn", None)
    own = _batch_size(loader)
    if collate is None or own is None:
        raise ConfigurationError(
            f"Batches cannot be sampled from {_described(loader)}: it needs a DataLoader over a dataset with a length."
            f" {hint}"
        )
    size = min(own, size or own)
    count = min(count, len(dataset) // size)
    stride = max(1, len(dataset) // (count * size))
    with _random_state_kept():
        return [
            collate([dataset[index] for index in range(first, first + size * stride, stride)])
            for first in range(0, count * size * stride, size * stride)
        ]


def _batch_size(loader: Any) -> int | None:
    """Returns the samples of a batch, at most those there are; None where it is no loader over a dataset."""
    dataset: Any = getattr(loader, "dataset", None)
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None) or getattr(loader, "batch_size", None)
    if size is None or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return None
    return min(int(size), len(dataset))


def _described(loader: Any) -> str:
    dataset = getattr(loader, "dataset", None)
    if dataset is not None:
        return f"a {type(loader).__name__} over {type(dataset).__name__}"
    loaders = " of loaders" if isinstance(loader, (Mapping, list, tuple)) else ""
    return f"a {type(loader).__name__}{loaders}"


def _length(batch: Any) -> int:
    """Returns the tokens of each sample of a padded batch."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else getattr(batch, "input_ids", None)
    if tokens is None and isinstance(batch, Sequence) and len(batch) > 0:
        tokens = batch[0]
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        raise ConfigurationError(f"A training batch, a {type(batch).__name__}, holds no token ids. {_HINT}")
    return int(tokens.shape[1])


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Puts back the random state of Python, NumPy and torch on the CPU."""
    states = random.getstate(), torch.get_rng_state()
    try:
        import numpy
    except ImportError:  # torch works without it
        numpy = None
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)


def read_shape(shape: Any) -> tuple[int, int]:
    """Returns a (batch, sequence) from what a user gave as `latency_input`.

    Raises:
        ConfigurationError: It is something else.
    """
    values = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else (shape,)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ConfigurationError(
            f"latency_input must be (batch, sequence), two whole numbers of at least 1, got {shape!r}."
        )
    return values
