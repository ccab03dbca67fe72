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

    The batches are collated from samples spread evenly over the dataset; the loader itself is not iterated, and the
    random state is put back, so training sees the same batches as without this.

    Args:
        loader: A `torch.utils.data.DataLoader` over a map-style dataset.

    Returns:
        The loader's batch size, and the median of the padded lengths in tokens.

    Raises:
        ConfigurationError: The loader is of another kind, or its batches hold no token ids.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate: Any = getattr(loader, "collate_fn", None)
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None) or getattr(loader, "batch_size", None)
    if collate is None or size is None or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ConfigurationError(
            f"The typical batch shape cannot be read from a {type(loader).__name__} over {type(dataset).__name__}: it"
            f" needs a DataLoader over a dataset with a length. {_HINT}"
        )
    size = min(int(size), len(dataset))
    count = min(_BATCHES, len(dataset) // size)
    stride = max(1, len(dataset) // (count * size))
    lengths = []
    with _random_state_kept():
        for number in range(count):
            indices = range(number * size * stride, (number + 1) * size * stride, stride)
            lengths.append(_length(collate([dataset[index] for index in indices])))
    return size, round(statistics.median(lengths))


def _length(batch: Any) -> int:
    """Returns the tokens of each sample of a padded batch."""
    tokens = batch["input_ids"] if isinstance(batch, Mapping) and "input_ids" in batch else None
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
