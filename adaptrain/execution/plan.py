"""A batch cut into micro-batches, each with its share in the loss, and their outputs put together again."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrain.errors import ConfigurationError
from adaptrain.execution.split import BatchLayout, Piece, batch_size
from adaptrain.execution.weight import WeightBy, sample_weights

Split = Callable[[Any, int], Sequence[Any]]


class Plan:
    """The micro-batches of one attempt. Iterate for `(number, micro-batch, share)`; tensors are cut on the way.

    A micro-batch in which nothing counts is left out: its mean would be 0/0, and it adds nothing to the loss. `every`
    yields it too.

    Args:
        batches: Cuts the micro-batches, one after the other.
        weights: How much each counts.
        pieces: Where each lies in the batch.
        layout: The batch's layout, where its rows are known.
    """

    def __init__(
        self,
        batches: Callable[[], Iterator[Any]],
        weights: Sequence[float],
        pieces: Sequence[Piece],
        layout: BatchLayout | None = None,
    ) -> None:
        if not sum(weights):  # nothing counts anywhere: the loss is what it would be unsplit
            weights = [float(piece.size) for piece in pieces]
        self._batches = batches
        self._layout = layout
        self.pieces = list(pieces)
        self.total = float(sum(weights))
        self.shares = [weight / self.total for weight in weights]

    def __iter__(self) -> Iterator[tuple[int, Any, float]]:
        return (piece for piece in self.every() if piece[2])

    def every(self) -> Iterator[tuple[int, Any, float]]:
        """Yields as iterating does, and also what counts nothing."""
        return zip(itertools.count(), self._batches(), self.shares, strict=False)

    @property
    def largest(self) -> int:
        """Samples of the largest micro-batch."""
        return max(piece.size for piece in self.pieces)

    def join(self, outputs: Sequence[tuple[int, Any]]) -> Any:
        """Puts the outputs of the micro-batches together, as the unsplit step would have returned them.

        Tensors and arrays with a row per sample, and lists with an entry per sample, are concatenated in the loader's
        order, with columns that were trimmed filled with zeros; scalars are averaged by their share; mappings, lists
        and tuples are joined entry by entry. Anything else becomes a list with an entry per micro-batch.

        Args:
            outputs: `(number, output)` of the micro-batches that ran. In training the output is what `training_step`
                returned beside the loss, a dict.
        """
        if not outputs:
            return {}
        if len(self.pieces) == 1 and self.pieces[0].columns is None:
            return outputs[0][1]
        return self._join(
            [(self.pieces[number], self.shares[number]) for number, _ in outputs], [o for _, o in outputs]
        )

    def _join(self, ran: list[tuple[Piece, float]], values: list[Any]) -> Any:
        first = values[0]
        if all(value is None for value in values):
            return None
        if all(isinstance(value, (float, int)) or (isinstance(value, Tensor) and not value.ndim) for value in values):
            return _mean(values, [share for _, share in ran])
        if all(_rows(value) == piece.size for value, (piece, _) in zip(values, ran, strict=True)):
            return self._concatenate([piece for piece, _ in ran], values)
        if any(type(value) is not type(first) for value in values):
            return values
        if isinstance(first, Mapping):
            joined: Any = copy.copy(first)  # keeps the class, as of a model's output
            for key in first:
                joined[key] = self._join(ran, [value.get(key) for value in values])
            return joined
        if isinstance(first, (list, tuple)) and all(len(value) == len(first) for value in values):
            items = [self._join(ran, list(each)) for each in zip(*values, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        return values

    def _concatenate(self, pieces: list[Piece], values: list[Any]) -> Any:
        first = values[0]
        order = self._layout.order if self._layout is not None and len(self.pieces) > 1 else None
        present = [row for piece in pieces for row in order[slice(*piece.rows)]] if order is not None else None
        if isinstance(first, list):
            entries = [entry for value in values for entry in value]
            return entries if present is None else [entries[place] for place in _inverse(present)]
        if not isinstance(first, Tensor):
            if len({value.shape[1:] for value in values}) > 1:
                return values
            array = sys.modules["numpy"].concatenate(values)
            return array if present is None else array[_inverse(present)]
        wide = [self._widen(value, piece) for value, piece in zip(values, pieces, strict=True)]
        if len({value.shape[1:] for value in wide}) > 1:
            return values  # such as generated sequences, each as long as the longest beside it
        rows = torch.cat(wide)
        return rows if present is None else rows[torch.tensor(_inverse(present)).to(rows.device)]

    def _widen(self, value: Tensor, piece: Piece) -> Tensor:
        if self._layout is None or piece.columns is None or value.ndim < 2 or value.shape[1] != piece.length:
            return value
        wide = value.new_zeros((value.shape[0], self._layout.length, *value.shape[2:]))
        wide[:, slice(*piece.columns)] = value
        return wide


def _rows(value: Any) -> int | None:
    """The rows of a tensor or array, or the entries of a list that has one per sample; None for anything else."""
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        return value.shape[0] if value.ndim else None
    if isinstance(value, list) and not all(_rows(entry) == len(value) for entry in value):
        return len(value)  # else a list of tensors with a row per sample each
    return None


def _mean(values: list[Any], shares: list[float]) -> Any:
    counted = [(value, share) for value, share in zip(values, shares, strict=True) if share]
    return sum(value * share for value, share in counted) / sum(share for _, share in counted)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def make_plan(
    batch: Any,
    layout: BatchLayout | None,
    micro_batch_size: int,
    *,
    weight_by: WeightBy,
    split: Split | None = None,
    weigh_whole: bool = False,
) -> Plan:
    """Cuts a batch.

    Args:
        batch: The whole batch.
        layout: Its layout; None where it cannot be split and is run whole.
        micro_batch_size: Samples at once.
        weight_by: See `sample_weights`; or a callable that returns the weight of a micro-batch.
        split: The user's own `split(batch, micro_batch_size)`, in place of the layout.
        weigh_whole: Weigh also where there is one micro-batch only, to compare with other ranks.

    Returns:
        The plan.

    Raises:
        ConfigurationError: The batch, or what `split` returned, cannot be weighed.
    """
    if split is not None:
        return _plan_of(list(split(batch, micro_batch_size)), weight_by)
    if layout is None:
        weights = [float(weight_by(batch))] if callable(weight_by) else [1.0]
        return Plan(lambda: iter([batch]), weights, [Piece((0, 1), None, 1)])
    pieces = layout.pieces(micro_batch_size)

    def cut() -> Iterator[Any]:
        ordered = layout.ordered(batch) if len(pieces) > 1 else batch
        return (layout.take(ordered, piece) for piece in pieces)

    if callable(weight_by):
        weights = [float(weight_by(micro_batch)) for micro_batch in cut()]
    elif len(pieces) == 1 and not weigh_whole:
        weights = [1.0]
    else:
        each = sample_weights(batch, layout.size, weight_by)
        if layout.order is not None:
            each = [each[row] for row in layout.order]
        weights = [sum(each[slice(*piece.rows)]) for piece in pieces]
    return Plan(cut, weights, pieces, layout)


def _plan_of(batches: list[Any], weight_by: WeightBy) -> Plan:
    sizes = [batch_size(batch) for batch in batches]
    if not batches:
        raise ConfigurationError("split returned no micro-batch. It must return every sample of the batch once.")
    if callable(weight_by):
        weights = [float(weight_by(batch)) for batch in batches]
    elif None in sizes:
        raise ConfigurationError(
            "split returned micro-batches whose number of samples cannot be told from their tensors. Give weight_by a"
            " callable that returns a micro-batch's weight."
        )
    else:
        weights = [sum(sample_weights(batch, size or 0, weight_by)) for batch, size in zip(batches, sizes, strict=True)]
    pieces, first = [], 0
    for size in sizes:
        pieces.append(Piece((first, first + (size or 1)), None, 1))
        first += size or 1
    return Plan(lambda: iter(batches), weights, pieces)
