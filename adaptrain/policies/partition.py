"""Where to cut a batch sorted by length, so that its micro-batches cost the least time together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def even_bounds(first: int, last: int, most: int) -> list[int]:
    """Returns the bounds of the fewest parts of at most `most` that are even in size, from `first` to `last`."""
    size, count = last - first, -(-(last - first) // most)
    return [first + size * index // count for index in range(count + 1)]


def cheapest_bounds(lengths: Sequence[int], most: int, piece_cost: float) -> list[int]:
    """Returns the bounds of micro-batches with the least cost together.

    Every sample of a micro-batch is padded to its longest, and every micro-batch costs `piece_cost` tokens on top
    (launches, the gradients of all weights): the cost is the sum of `piece_cost` + samples x longest. Fewer, longer
    micro-batches pad more; the best cuts are found by dynamic programming over the places where the length changes.

    Args:
        lengths: Tokens of each sample, falling.
        most: Samples of a micro-batch at most.
        piece_cost: What a micro-batch costs beside its tokens, in tokens, at least 0.

    Returns:
        The bounds, from 0 to the number of samples.
    """
    cuts = [0]
    for _, run in itertools.groupby(lengths):
        first = cuts[-1]
        cuts += even_bounds(first, first + len(list(run)), most)[1:]
    best, before = [0.0], [0]
    for last in range(1, len(cuts)):
        options = []
        for first in range(last - 1, -1, -1):
            samples = cuts[last] - cuts[first]
            if samples > most:
                break
            options.append((best[first] + piece_cost + samples * lengths[cuts[first]], first))
        cost, chosen = min(options)
        best.append(cost)
        before.append(chosen)
    bounds, place = [cuts[-1]], len(cuts) - 1
    while place:
        place = before[place]
        bounds.append(cuts[place])
    return bounds[::-1]
