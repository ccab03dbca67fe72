"""Splitting a batch of any common shape into micro-batches: by samples, or sorted by length with padding trimmed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptrain.policies.partition import cheapest_bounds, even_bounds

IGNORED = -100  # the label that PyTorch's and Hugging Face's losses leave out


@dataclass(frozen=True)
class Piece:
    """One micro-batch of a `BatchLayout`: rows of the ordered batch, columns of its sequences.

    Args:
        rows: First row, and one past the last.
        columns: First column of the padded sequences, and one past the last; None where nothing is trimmed.
        length: Columns that remain (1 where the batch has no sequences).
    """

    rows: tuple[int, int]
    columns: tuple[int, int] | None
    length: int

    @property
    def size(self) -> int:
        """Samples in the micro-batch."""
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True)
class BatchLayout:
    """What is known of a batch before it is split.

    Args:
        size: Samples: the size of dimension 0 of its tensors.
        length: Columns of its padded sequences; 1 where it has none.
        spans: Per sample, the first column that is not padding and one past the last; None where the batch is not
            split by length.
        order: The rows by falling length; None where they stay as they are.
        whole: Paths of tensors that look like sequences and are not: never trimmed.
        piece_cost: What a micro-batch costs beside its tokens, in tokens; None where that is not known.
    """

    size: int
    length: int = 1
    spans: Sequence[tuple[int, int]] | None = None
    order: Sequence[int] | None = None
    whole: frozenset[tuple[Any, ...]] = field(default_factory=frozenset)
    piece_cost: float | None = None
    _known: dict[int, list[Piece]] = field(default_factory=dict, repr=False, compare=False)

    def pieces(self, micro_batch_size: int) -> list[Piece]:
        """Returns the micro-batches of at most `micro_batch_size` samples, longest first.

        They are even in size; or the cheapest together, where the batch is sorted by length and `piece_cost` is known.
        """
        most = max(1, micro_batch_size)
        if most not in self._known:
            if self.spans is not None and self.piece_cost is not None:
                rows = self.order if self.order is not None else range(self.size)
                bounds = cheapest_bounds([self.spans[r][1] - self.spans[r][0] for r in rows], most, self.piece_cost)
            else:
                bounds = even_bounds(0, self.size, most)
            self._known[most] = [self._piece(first, last) for first, last in itertools.pairwise(bounds)]
        return self._known[most]

    def _piece(self, first: int, last: int) -> Piece:
        if self.spans is None:
            return Piece((first, last), None, self.length)
        rows = self.order[first:last] if self.order is not None else range(first, last)
        start = min(self.spans[row][0] for row in rows)
        stop = max(self.spans[row][1] for row in rows)
        return Piece((first, last), None if stop - start == self.length else (start, stop), stop - start)

    def ordered(self, batch: Any) -> Any:
        """Returns the batch with its rows in `order`, to be given to `take`. One copy; none where `order` is None."""
        if self.order is None:
            return batch
        index = torch.tensor(self.order)

        def pick(leaf: Any, path: tuple[Any, ...]) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.index_select(0, index.to(leaf.device))
            return type(leaf)(leaf[row] for row in self.order or ())

        return _map_samples(batch, self.size, pick)

    def take(self, ordered: Any, piece: Piece) -> Any:
        """Returns one micro-batch of a batch that `ordered` returned: the batch itself where it is all of it."""
        if piece.size == self.size and piece.columns is None:
            return ordered
        first, last = piece.rows

        def cut(leaf: Any, path: tuple[Any, ...]) -> Any:
            if isinstance(leaf, Tensor) and piece.columns is not None and self._is_sequence(leaf, path):
                # Models call `view` on labels and ids, which needs contiguous memory.
                return leaf[first:last, piece.columns[0] : piece.columns[1]].contiguous()
            return leaf[first:last]

        return _map_samples(ordered, self.size, cut)

    def _is_sequence(self, leaf: Tensor, path: tuple[Any, ...]) -> bool:
        return leaf.ndim >= 2 and leaf.shape[1] == self.length and path not in self.whole


def batch_size(batch: Any) -> int | None:
    """Returns the samples of a batch: the size its tensors share in dimension 0.

    Served are tensors, and mappings (`dict`, `BatchEncoding`), dataclasses, tuples and lists of them, nested. A
    tensor without dimensions, or with one row beside others of more, and anything that is not a tensor is shared by
    all micro-batches, except a list with one entry per sample, which is split.

    Args:
        batch: What the loader yields.

    Returns:
        The size, or None where there is no tensor or their sizes differ: such a batch cannot be split safely.
    """
    sizes = {leaf.shape[0] for leaf, _ in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(sizes) == 2:
        sizes.discard(1)
    return sizes.pop() if len(sizes) == 1 else None


def why_whole(batch: Any) -> str:
    """Returns what keeps a batch without a `batch_size` from being split."""
    sizes = {path: leaf.shape[0] for leaf, path in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
    if batch_size(batch) == 0:
        return "it holds no samples"
    if not sizes:
        return f"no tensors are found in a {type(batch).__name__}"
    named = [f"{'.'.join(map(str, path)) or 'the tensor'}: {size}" for path, size in list(sizes.items())[:8]]
    return f"its tensors do not share one size in dimension 0 ({', '.join(named)})"


def elements_per_sample(batch: Any) -> int:
    """Returns the elements of a batch's tensors per sample, a measure of the memory one takes; 1 without tensors."""
    size = batch_size(batch)
    if not size:
        return 1
    tensors = (leaf for leaf, _ in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
    return max(1, sum(leaf.numel() for leaf in tensors if leaf.shape[0] == size) // size)


def copy_containers(batch: Any) -> Any:
    """Returns the same tensors in dicts, lists and tuples of their own: a step may take entries out of its batch."""
    if isinstance(batch, UserDict) or type(batch) is dict:
        copied = copy.copy(batch)
        for key, value in batch.items():
            copied[key] = copy_containers(value)
        return copied
    if type(batch) in (list, tuple):
        return type(batch)(copy_containers(value) for value in batch)
    return _with_fields(batch, lambda _, value: copy_containers(value)) if _is_dataclass(batch) else batch


def layout(
    batch: Any, *, by_length: bool, trim_left: bool = False, multiple: int = 1, piece_cost: float | None = None
) -> BatchLayout | None:
    """Reads a batch's shape, and its lengths where it is to be split by length.

    A sample's length comes from the first `attention_mask` of shape (samples, columns). A column with a label that
    counts (labels of the mask's shape, not -100) is never taken for padding, so that no term of the loss is lost.
    Columns on the left are trimmed only where that cannot move a token to another position: where the batch brings
    `position_ids`, or with `trim_left`; and not where a sample's first token is itself a label, which a causal model
    predicts from the padding before it.

    Args:
        batch: What the loader yields.
        by_length: Sort by length and trim padding; where there is no mask, the rows stay as they are.
        trim_left: The model knows positions only relative to each other (rotary embeddings).
        multiple: Of which a sample keeps columns, as far as there are: what is trimmed is less by so much padding.
        piece_cost: See `BatchLayout`.

    Returns:
        The layout, or None where the batch cannot be split (see `batch_size`).
    """
    size = batch_size(batch)
    if size is None or size == 0:
        return None
    named = {path[-1]: leaf for leaf, path in reversed(list(leaves(batch))) if path and isinstance(leaf, Tensor)}
    mask = named.get("attention_mask")
    if mask is None or mask.ndim != 2:
        ids = named.get("input_ids")
        return BatchLayout(size, length=ids.shape[1] if ids is not None and ids.ndim >= 2 else 1)
    columns = mask.shape[1]
    if not by_length:
        return BatchLayout(size, length=columns)

    used = mask != 0
    labels = named.get("labels")
    sequence_labels = labels is not None and labels.shape == mask.shape and not labels.is_floating_point()
    counted = labels != IGNORED if sequence_labels and labels is not None else None
    kept = used if counted is None else used | counted
    # argmax gives the first of equal values; an empty row keeps all its columns.
    kept_int = kept.to(torch.uint8)
    starts = kept_int.argmax(1)
    stops = columns - kept_int.flip(1).argmax(1)
    if not (trim_left or "position_ids" in named):
        starts = torch.zeros_like(starts)
    elif counted is not None:
        starts = torch.where(counted.gather(1, starts[:, None])[:, 0], 0, starts)
    both = torch.stack([starts, stops]).tolist()  # one transfer from the device
    spans = [_rounded(start, stop, columns, multiple) for start, stop in zip(*both, strict=True)]
    lengths = [stop - start for start, stop in spans]
    if min(lengths) == max(lengths) == columns:
        return BatchLayout(size, length=columns)
    order = sorted(range(size), key=lambda row: -lengths[row])
    whole = frozenset(path for leaf, path in leaves(batch) if _only_looks_like_sequence(leaf, used))
    return BatchLayout(size, columns, spans, order if order != list(range(size)) else None, whole, piece_cost)


def _rounded(start: int, stop: int, columns: int, multiple: int) -> tuple[int, int]:
    """Widens a span to a multiple of columns: to the right as far as there are any, else to the left."""
    length = min(columns, -(-(stop - start) // multiple) * multiple)
    stop = min(columns, start + length)
    return stop - length, stop


def _only_looks_like_sequence(leaf: Any, used: Tensor) -> bool:
    """A table of features or targets may have as many columns as the sequences: it holds values beside them."""
    if not isinstance(leaf, Tensor) or leaf.shape != used.shape or not leaf.is_floating_point():
        return False
    return bool((leaf.masked_fill(used, 0) != 0).any())


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yields what a batch holds, containers opened, each with the keys that lead to it."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            yield from leaves(value, (*path, number))
    elif _is_dataclass(node):
        yield from leaves({field.name: getattr(node, field.name) for field in dataclasses.fields(node)}, path)
    else:
        yield node, path


def _is_dataclass(node: Any) -> bool:
    return dataclasses.is_dataclass(node) and not isinstance(node, (type, Mapping))


def _with_fields(node: Any, change: Callable[[str, Any], Any]) -> Any:
    result = copy.copy(node)
    for each in dataclasses.fields(node):
        object.__setattr__(result, each.name, change(each.name, getattr(node, each.name)))  # frozen ones too
    return result


def _map_samples(node: Any, size: int, change: Any, path: tuple[Any, ...] = ()) -> Any:
    """Rebuilds a batch with every leaf that has one entry per sample changed; the rest is shared."""
    if isinstance(node, Tensor):
        return change(node, path) if node.ndim and node.shape[0] == size else node
    if isinstance(node, Mapping):
        result: Any = copy.copy(node)  # keeps the class and what a BatchEncoding carries beside its data
        for key, value in node.items():
            result[key] = _map_samples(value, size, change, (*path, key))
        return result
    if isinstance(node, (list, tuple)):
        if len(node) == size and not any(isinstance(leaf, Tensor) for leaf, _ in leaves(node)):
            return change(node, path) if not hasattr(node, "_fields") else node
        items = [_map_samples(value, size, change, (*path, number)) for number, value in enumerate(node)]
        return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
    if _is_dataclass(node):
        return _with_fields(node, lambda name, value: _map_samples(value, size, change, (*path, name)))
    return node
