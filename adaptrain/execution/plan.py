"""A batch cut into micro-batches, each with its share in the loss, and their outputs put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrain.errors import ConfigurationError
from adaptrain.execution.split import BatchLayout, Piece, batch_size
from adaptrain.execution.weight import WeightBy, sample_weights

Split = Callable[[Any, int], Sequence[Any]]


class Plan:
    """The micro-batches of one attempt. Iterate for `(number, micro-batch, share)`; tensors are cut on the way.

    A micro-batch in which nothing counts is left out: its mean would be 0/0, and it adds nothing to the loss.

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
        batches = self._batches()
        for number, share in enumerate(self.shares):
            micro_batch = next(batches)
            if share:
                yield number, micro_batch, share

    @property
    def largest(self) -> int:
        """Samples of the largest micro-batch."""
        return max(piece.size for piece in self.pieces)

    def join(self, outputs: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        """Puts what `training_step` returned beside the loss together, as the unsplit step would have returned it.

        Tensors with a row per sample are concatenated in the loader's order, with columns that were trimmed filled
        with zeros; scalars are averaged by their share; anything else becomes a list with an entry per micro-batch.

        Args:
            outputs: `(number, values)` of the micro-batches that ran.
        """
        if not outputs:
            return {}
        if len(self.pieces) == 1 and self.pieces[0].columns is None:
            return outputs[0][1]
        return {key: self._join([(number, values.get(key)) for number, values in outputs]) for key in outputs[0][1]}

    def _join(self, outputs: list[tuple[int, Any]]) -> Any:
        values = [value for _, value in outputs]
        pieces = [self.pieces[number] for number, _ in outputs]
        if all(isinstance(value, (float, int)) or (isinstance(value, Tensor) and not value.ndim) for value in values):
            shares = [self.shares[number] for number, _ in outputs]
            return sum(value * share for value, share in zip(values, shares, strict=True)) / sum(shares)
        rows = all(
            isinstance(value, Tensor) and value.ndim and value.shape[0] == piece.size
            for value, piece in zip(values, pieces, strict=True)
        )
        if not rows:
            return values
        joined = torch.cat([self._widen(value, piece) for value, piece in zip(values, pieces, strict=True)])
        order = self._layout.order if self._layout is not None and len(self.pieces) > 1 else None
        if order is None:
            return joined
        present = [row for piece in pieces for row in order[slice(*piece.rows)]]
        return joined[torch.tensor(present).argsort().to(joined.device)]

    def _widen(self, value: Tensor, piece: Piece) -> Tensor:
        if self._layout is None or piece.columns is None or value.ndim < 2 or value.shape[1] != piece.length:
            return value
        wide = value.new_zeros((value.shape[0], self._layout.length, *value.shape[2:]))
        wide[:, slice(*piece.columns)] = value
        return wide


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
