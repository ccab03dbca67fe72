"""Which weight matrices get how large a low-rank adapter, within a number of trainable parameters."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def allocate_ranks(gains: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> list[int]:
    """Spends a budget of parameters, one rank after the other, where the next one gains most for what it costs.

    Gains that fall with the rank make this greedy choice the best one, but for what the last rank leaves over. A rank
    that no longer fits is passed over for cheaper ones.

    Args:
        gains: For each matrix what its first, second, ... rank is worth, each at least 0; their number is the most.
        costs: For each matrix the parameters of one rank, above 0.
        budget: Parameters to spend, in all.

    Returns:
        The rank of each matrix; 0 where nothing is worth its cost.
    """
    ranks = [0] * len(gains)
    queue = [(-own[0] / cost, place) for place, (own, cost) in enumerate(zip(gains, costs, strict=True)) if own]
    heapq.heapify(queue)
    while queue:
        gain, place = heapq.heappop(queue)
        if gain == 0:
            break
        if costs[place] > budget:
            continue
        budget -= costs[place]
        ranks[place] += 1
        if ranks[place] < len(gains[place]):
            heapq.heappush(queue, (-gains[place][ranks[place]] / costs[place], place))
    return ranks
