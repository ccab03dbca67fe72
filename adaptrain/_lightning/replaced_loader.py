"""A training loader with another batch sampler: which loaders can have one, and the copy that does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from adaptrain.errors import ConfigurationError
from adaptrain.execution.sampler import ResizableBatchSampler


class Place(Protocol):
    """Keeps where in the epoch training is; `ResizableLoader` is one."""

    @property
    def sampler(self) -> ResizableBatchSampler: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def loader_batch_size(loader: Any, *, callback: str) -> int:
    """Returns the batch size of a training loader that can be resized.

    Args:
        loader: What the user gave as training loader.
        callback: The callback's class name, for the message.

    Raises:
        ConfigurationError: It cannot be resized.
    """
    fix = "Use a torch DataLoader with batch_size=..., or leave global_batch_size=None."
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(
            f"{callback}: global_batch_size needs a torch DataLoader, but the training loader is a"
            f" {type(loader).__name__}. {fix}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigurationError(
            f"{callback}: global_batch_size does not serve an IterableDataset ({type(loader.dataset).__name__}): its"
            " samples come without an order that could be grouped anew. Use a map-style data set, or leave"
            " global_batch_size=None."
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        own = "no batch_size" if loader.batch_sampler is None else f"its own {type(loader.batch_sampler).__name__}"
        raise ConfigurationError(
            f"{callback}: global_batch_size would replace the batches of the training loader, which has {own}. {fix}"
        )
    own_iteration = type(loader).__iter__ is not DataLoader.__iter__ or hasattr(loader, "state_dict")
    if own_iteration and not getattr(loader, "order_is_samplers", False):
        raise ConfigurationError(
            f"{callback}: global_batch_size would replace how {type(loader).__name__} iterates or resumes. {fix}"
        )
    return loader.batch_size


class _Resizable(DataLoader[Any]):
    """What a replaced loader does differently: it starts with the first batch, and its place is kept elsewhere."""

    _place: Place

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # As a generator: only with the first batch have Lightning's loops set the epoch and restored their state, and
        # workers would take batches at once.
        random_state = torch.get_rng_state(), self.generator and self.generator.get_state()
        batches = DataLoader.__iter__(self)
        if self._place.sampler.is_resumed:
            # Starting draws a number, which the uninterrupted run did not in the middle of the epoch.
            torch.set_rng_state(random_state[0])
            if self.generator is not None:
                self.generator.set_state(random_state[1])
        yield from batches

    def state_dict(self) -> dict[str, Any]:
        return self._place.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._place.load_state_dict(state)


def replaced_loader(loader: DataLoader[Any], sampler: ResizableBatchSampler, place: Place) -> DataLoader[Any]:
    """Returns a copy of the loader, of its class, with another batch sampler; the user's own is left alone."""
    replaced = copy.copy(loader)
    # Torch forbids setting these on a loader that is in use; this one is not yet.
    vars(replaced).update(batch_sampler=sampler, _iterator=None, _place=place)
    replaced.__class__ = type(type(loader).__name__, (_Resizable, type(loader)), {})
    return replaced
