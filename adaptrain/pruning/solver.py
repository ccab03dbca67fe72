"""Which units to give up so that a model fits every limit at once, for the least loss of what they are worth."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from adaptrain.pruning.cost_table import CostTable, Widths
from adaptrain.pruning.importance import Scores
from adaptrain.pruning.structure import Structure, copy_of, widths

_TINY = 1e-12


@dataclass(frozen=True)
class _Place:
    """Where units can go together: one layer, or all layers where they are to stay equally wide."""

    layers: tuple[int, ...]
    kind: str
    allowed: Sequence[int]


@dataclass(frozen=True)
class _Move:
    """Taking a place down to a width, from the width that it has.

    `saved` is what each limited cost falls by; of memory it is the part of the weights, the working set comes on top.
    """

    place: _Place
    width: int
    lost: float
    saved: Mapping[str, float]


class _WorkingSets:
    """The largest working set of any layer, and what it would be with one place narrower."""

    def __init__(self, now: Widths, table: CostTable) -> None:
        self.table = table
        self.peak = table.peak(now)
        found = (
            (table.working_set(layer, kind, width), layer, kind)
            for layer, kinds in enumerate(now)
            for kind, width in kinds.items()
        )
        self._largest = sorted(found, reverse=True)

    def saved(self, move: _Move) -> float:
        """Returns the bytes by which a move makes the largest working set smaller."""
        place = move.place
        others = (size for size, layer, kind in self._largest if kind != place.kind or layer not in place.layers)
        own = (self.table.working_set(layer, place.kind, move.width) for layer in place.layers)
        return self.peak - max(self.table.floor, next(others, 0.0), *own)


def solve(
    structure: Structure,
    scores: Scores,
    table: CostTable,
    limits: Mapping[str, float],
    round_to: Mapping[str, int],
    uniform: Mapping[str, Sequence[int]] | None = None,
) -> Structure:
    """Cuts a structure until it meets every limit.

    A greedy knapsack: of all ways to narrow one layer's heads or neurons, by one step or by several at once, take the
    one that loses the least score for what it gains, a gain being the share of the excess over a limit that it
    removes, summed over the limits that are not met yet. Several steps at once are weighed because latency need not
    fall with every step. At the end, what the last moves gave up needlessly is taken back.

    Args:
        structure: What is left now. Nothing that is gone comes back.
        scores: What each unit is worth.
        table: What each structure costs.
        limits: The absolute limits by cost: `"params"`, `"flops"`, `"memory"`, `"latency"`.
        round_to: The width of each kind becomes a multiple of this, or 0.
        uniform: Kinds that are narrowed in all layers at once, so that these stay equally wide, and the widths they
            may have, ascending; None: each layer on its own.

    Returns:
        The structure that fits; where none does, the smallest one.
    """
    ranked = [
        {kind: sorted(layer[kind], key=lambda unit, s=scores[index][kind]: (-s[unit], unit)) for kind in table.kinds}
        for index, layer in enumerate(structure)
    ]
    places = _places(structure, table.kinds, round_to, uniform or {})
    now = widths(structure)
    for place in places:
        _set(now, place, min(now[layer][place.kind] for layer in place.layers))
    most = [{**layer} for layer in now]
    # A place's moves stay what they are until it is narrowed itself.
    moves = [_moves(place, now, ranked, scores, table, limits) for place in places]
    while (best := _cheapest(moves, now, table, limits)) is not None:
        index, width = best
        _set(now, places[index], width)
        moves[index] = _moves(places[index], now, ranked, scores, table, limits)
    _take_back(now, most, places, ranked, scores, table, limits)
    kept = copy_of(structure)
    for index, layer in enumerate(ranked):
        for kind, units in layer.items():
            kept[index][kind] = sorted(units[: now[index][kind]])
    return kept


def _places(
    structure: Structure, kinds: Sequence[str], round_to: Mapping[str, int], uniform: Mapping[str, Sequence[int]]
) -> list[_Place]:
    layers = range(len(structure))
    single = [
        _Place((layer,), kind, range(0, len(structure[layer][kind]), round_to[kind]))
        for layer in layers
        for kind in kinds
        if kind not in uniform
    ]
    return single + [_Place(tuple(layers), kind, uniform[kind]) for kind in kinds if kind in uniform]


def _set(widths: list[dict[str, int]], place: _Place, width: int) -> None:
    for layer in place.layers:
        widths[layer][place.kind] = width


def _moves(
    place: _Place,
    now: Widths,
    ranked: Sequence[Mapping[str, Sequence[int]]],
    scores: Scores,
    table: CostTable,
    names: Iterable[str],
) -> list[_Move]:
    """Returns the ways to narrow one place, with what each loses and saves of the costs named."""
    kind, layers, lost = place.kind, place.layers, 0.0
    width = before = now[layers[0]][kind]
    found = []
    for narrower in _narrower(width, place.allowed):
        lost += sum(scores[layer][kind][unit] for layer in layers for unit in ranked[layer][kind][narrower:width])
        width = narrower
        saved = {
            name: sum(table.piece(name, at, kind, before) - table.piece(name, at, kind, width) for at in layers)
            for name in names
        }
        found.append(_Move(place, width, lost, saved))
    return found


def _cheapest(
    moves: Sequence[Sequence[_Move]], now: Widths, table: CostTable, limits: Mapping[str, float]
) -> tuple[int, int] | None:
    """Returns which place to narrow and to what width; None where all limits are met, or nothing brings them nearer."""
    excess = {name: over for name, limit in limits.items() if (over := table.cost(name, now) - limit) > 0}
    sets = _WorkingSets(now, table) if "memory" in excess else None
    best = least = None
    for index, own in enumerate(moves):
        for move in own:
            gain = 0.0
            for name, over in excess.items():
                saved = move.saved[name]
                if sets is not None and name == "memory":
                    saved += sets.saved(move)
                gain += min(1.0, saved / over)
            if gain > _TINY:
                price = (move.lost / gain, -gain, move.place.layers, move.place.kind)
                if least is None or price < least:
                    best, least = (index, move.width), price
    return best


def _narrower(width: int, allowed: Sequence[int]) -> Iterator[int]:
    """Yields one step narrower, then two more, four more, ..., and the least."""
    index, count = bisect_left(allowed, width), 1
    while index > 0:
        index = max(0, index - count)
        count *= 2
        yield allowed[index]


def _take_back(
    now: list[dict[str, int]],
    most: Widths,
    places: Sequence[_Place],
    ranked: Sequence[Mapping[str, Sequence[int]]],
    scores: Scores,
    table: CostTable,
    limits: Mapping[str, float],
) -> None:
    """Widens again, the most valuable first and up to `most`, where every limit is met all the same."""

    def width(place: _Place, of: Widths) -> int:
        return of[place.layers[0]][place.kind]

    def worth(place: _Place) -> float:
        kind, first = place.kind, width(place, now)
        return -sum(scores[layer][kind][ranked[layer][kind][first]] for layer in place.layers)

    for place in sorted((place for place in places if width(place, now) < width(place, most)), key=worth):
        while (before := width(place, now)) < width(place, most):
            above = bisect_right(place.allowed, before)
            wider = place.allowed[above] if above < len(place.allowed) else width(place, most)
            _set(now, place, min(wider, width(place, most)))
            if any(table.cost(name, now) > limit for name, limit in limits.items()):
                _set(now, place, before)
                break
