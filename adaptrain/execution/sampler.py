"""A batch sampler whose batch size may change in the middle of an epoch, and which goes on there after a restart."""

from __future__ import annotations

import array
import contextlib
import zlib
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch.utils.data import Sampler

from adaptrain.errors import ConfigurationError


class ResizableBatchSampler(Sampler[list[int]]):
    """Groups the samples of any sampler into batches; each sample is in one batch of an epoch, whatever the sizes.

    A loader with workers takes batches ahead of training. So the sampler counts batches from the epoch's begin: a
    change holds from a batch number on that was not handed out yet, the length is the number of batches of the whole
    epoch (those handed out and those still to come), and it begins anew only with a new iteration.

    Args:
        sampler: The samples' order, with a length.
        batch_size: Samples per batch.
        drop_last: Leave out the last batch of an epoch where it is smaller than `batch_size`.
        generators: The generators that the order, or the loader beside it, draws from: kept in the state.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Sequence[int],
        batch_size: int,
        drop_last: bool = False,
        *,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0
        self._has_changed = False  # in this epoch
        self._generators = list(generators)
        self._changes: list[tuple[int, int]] = []  # (first batch, size): those still to come
        self._forget_epoch()

    def _forget_epoch(self) -> None:
        self._first = 0  # batches before the first that this process hands out: a resumed epoch's
        self._ends = [0]  # the samples before each batch handed out, and after the last one
        self._sizes = [(0, self.batch_size)]  # (first batch, size) of those handed out
        self._order: list[int] | None = None
        self._replay: dict[str, Any] | None = None
        self._before: dict[str, str] = {}
        self._is_exhausted = False

    def start(self, epoch: int = 0) -> None:
        """Begins an epoch; a change that was still to come holds from its first batch on.

        Args:
            epoch: Its number.
        """
        self.epoch = epoch
        self._has_changed = False
        if self._changes:
            self.batch_size, self._changes = self._changes[-1][1], []
        self._forget_epoch()

    @property
    def samples(self) -> int:
        """Samples in an epoch."""
        return len(self._order) if self._order is not None else len(cast(Sized, self.sampler))

    @property
    def is_mixed(self) -> bool:
        """Whether the batches of this epoch differ in size, or will."""
        return self._has_changed or bool(self._changes)

    @property
    def is_resumed(self) -> bool:
        """Whether this epoch began before a restart."""
        return self._replay is not None

    @property
    def handed_out(self) -> int:
        """Batches of this epoch that were handed out, also before a restart."""
        return self._first + len(self._ends) - 1

    def __len__(self) -> int:
        """Returns the batches of this epoch: those handed out and those to come."""
        return self.handed_out + self._to_come(self.samples, whole=self.drop_last)

    def batches_within(self, samples: float) -> int:
        """Returns how many whole batches of this epoch lie within its first `samples` samples."""
        if samples < self._ends[-1]:
            return self._first + sum(end <= samples for end in self._ends[1:])
        return self.handed_out + self._to_come(int(samples), whole=True)

    def position(self, batches: int) -> int:
        """Returns the samples of this epoch's first `batches` batches, of those this process knows."""
        return self._ends[max(0, min(batches - self._first, len(self._ends) - 1))]

    def _to_come(self, until: int, *, whole: bool) -> int:
        """Batches from the last one handed out to sample `until`; the last of them whole, or not."""
        if self._is_exhausted:
            return 0
        left, count, size = until - self._ends[-1], 0, self.batch_size
        for start, changed in self._changes:
            before = start - self.handed_out - count
            if left <= before * size:
                break
            left, count, size = left - before * size, count + before, changed
        return count + (left // size if whole else -(-left // size))

    def resize(self, batch_size: int, *, every: int = 1) -> int:
        """Changes the size, from the first batch on that was not handed out.

        Args:
            batch_size: Samples per batch from then on.
            every: Only at a multiple of this many batches: an accumulation window stays of one size.

        Returns:
            The number of the first batch of the new size, counted from 0.
        """
        start = -(-self.handed_out // every) * every
        self._changes = [*(change for change in self._changes if change[0] < start), (start, batch_size)]
        return start

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Takes back what `resize` does inside the block."""
        changes = self._changes
        try:
            yield
        finally:
            self._changes = changes

    def __iter__(self) -> Iterator[list[int]]:
        """Hands out the rest of the epoch; all of the next one where some of it was handed out already."""
        if self._order is not None:
            self.start(self.epoch)
        order = self._order = self._draw()
        while (begin := self._ends[-1]) < len(order):
            while self._changes and self._changes[0][0] <= self.handed_out:
                self.batch_size = self._changes.pop(0)[1]
                self._sizes.append((self.handed_out, self.batch_size))
                self._has_changed = self._has_changed or begin > 0
            batch = order[begin : begin + self.batch_size]
            if self.drop_last and len(batch) < self.batch_size:
                break
            self._ends.append(begin + len(batch))
            yield batch
        self._is_exhausted = True

    def _draw(self) -> list[int]:
        if self._replay is None:
            before = self._random_states()
            order = list(self.sampler)
            after = self._random_states()
            self._before = {name: state for name, state in before.items() if state != after[name]}
            return order
        now = torch.get_rng_state()
        self._before = dict(self._replay["before"])
        self._set_random_states(self._before)
        order = list(self.sampler)
        torch.set_rng_state(now)
        if _checksum(order) != self._replay["checksum"]:
            raise ConfigurationError(
                f"The epoch of this checkpoint cannot be gone on with: {type(self.sampler).__name__} gives another"
                " order of the samples than in the run that was interrupted. Resume with the same data and number of"
                " processes; an own sampler must draw from torch's random numbers, or from a torch.Generator that is"
                " its attribute `generator`."
            )
        return order

    def _random_states(self) -> dict[str, str]:
        states = {"global": _to_hex(torch.get_rng_state())}
        return states | {str(i): _to_hex(generator.get_state()) for i, generator in enumerate(self._generators)}

    def _set_random_states(self, states: dict[str, str]) -> None:
        for name, state in states.items():
            if name == "global":
                torch.set_rng_state(_from_hex(state))
            else:
                self._generators[int(name)].set_state(_from_hex(state))

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Returns what going on after this epoch's first `batches` batches needs, in plain Python.

        Args:
            batches: Those that were trained on: what a loader took ahead does not count.
        """
        replay = self._replay
        if self._order is not None:
            replay = {"before": self._before, "checksum": _checksum(self._order)}
        generators = {name: state for name, state in self._random_states().items() if name != "global"}
        return {
            "epoch": self.epoch,
            "batches": max(batches, self._first),
            "position": self.position(batches),
            "batch_size": next(size for start, size in reversed(self._sizes) if start <= max(batches, self._first)),
            "changes": [*([start, size] for start, size in self._sizes if start > batches), *map(list, self._changes)],
            "has_changed": self._has_changed,
            "replay": replay,
            "generators": generators,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the epoch where `state_dict` was taken; the next iteration begins there."""
        self._forget_epoch()
        self.epoch = int(state["epoch"])
        self._has_changed = bool(state["has_changed"])
        self.batch_size = int(state["batch_size"])
        self._changes = [(int(start), int(size)) for start, size in state["changes"]]
        self._first = int(state["batches"])
        self._ends = [int(state["position"])]
        self._sizes = [(self._first, self.batch_size)]
        self._replay = state["replay"]
        self._set_random_states(state["generators"])


def _checksum(order: list[int]) -> int:
    return zlib.crc32(array.array("q", order).tobytes())


def _to_hex(tensor: torch.Tensor) -> str:
    return bytes(tensor.numpy()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
