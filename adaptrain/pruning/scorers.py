"""More ways to score units than by gradients of a gate and norms of weights, and the choice between all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import Match
from adaptrain.pruning.importance import (
    MagnitudeScores,
    RunningScores,
    Scorer,
    Scores,
    TaylorScores,
    check_trained,
    layer_adaptive,
)
from adaptrain.pruning.surgery import slices
from adaptrain.pruning.watch import OutputWatch, is_called, outputs

ScoreBy = str | Callable[[Match, tuple[str, ...]], Scores]
"""A name, or your own: `(match, groups) -> Scores`."""


class ActivationScores(RunningScores):
    """How much a unit says: the mean absolute activation of its output over the tokens that are not padding.

    A unit's output is what the output projection reads of it: a neuron after its nonlinearity (and gate), a head
    after attention. Watched in the forward passes of training, averaged over steps. Under data-parallel training each
    rank watches its own samples and the scores are averaged when they are used; a resumed run goes on with rank
    zero's averages.

    Source: Hu et al. 2016, "Network Trimming", who count what is not zero, for activations that seldom are.
    """

    def __init__(self, match: Match, kinds: tuple[str, ...], *, decay: float = 0.95) -> None:
        super().__init__(match, kinds, decay=decay)
        self._seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # sums over tokens, tokens
        self._sizes = {key: output.size for key, output in outputs(match, kinds).items()}  # of a unit's output

    def check(self) -> None:
        """Refuses a model whose output projections cannot be watched.

        Raises:
            ConfigurationError: One is `nn.MultiheadAttention`'s, which is never called as a module.
        """
        for (layer, kind), output in outputs(self.match, self.kinds).items():
            if not is_called(output):
                raise ConfigurationError(
                    f"importance='activation' cannot watch the {kind} of layer {layer}: nn.MultiheadAttention does"
                    " not call its output projection. Use importance='taylor'."
                )

    def start(self) -> Callable[[], None]:
        """Hooks into the forward passes; they compute the same as before."""
        return OutputWatch(self.match, self.kinds, self._see).start()

    def _see(self, key: tuple[int, str], read: Tensor, mask: Tensor | None) -> None:
        exact = torch.promote_types(read.dtype, torch.float32)  # a sum over many tokens
        tokens = read.abs().to(exact)
        real = tokens.new_ones(len(tokens)) if mask is None else mask.to(tokens)
        if len(real) != len(tokens):
            raise ConfigurationError(
                f"importance='activation' needs an attention_mask of shape (samples, tokens) to leave padding out, got"
                f" one of {len(real)} elements for activations of {tuple(read.shape)}. Use importance='taylor'."
            )
        sums, count = (real @ tokens).view(-1, self._sizes[key]).mean(1), real.sum()
        before = self._seen.get(key)
        self._seen[key] = (sums, count) if before is None else (before[0] + sums, before[1] + count)

    def update(self) -> None:
        """Takes in what the forward passes since the last step have shown."""
        dtype = next(self.match.model.parameters()).dtype
        self.observe({key: (sums / count).to(dtype) for key, (sums, count) in self._seen.items()})
        self._seen = {}


class MovementScores(RunningScores):
    """Whether training moves a unit away from zero or towards it: −Σ g·w over its parameters, summed over all steps.

    The sums may be negative. What they are within a layer counts from the lowest one, since no unit may be worth less
    than nothing.

    Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", by group.
    """

    def check(self) -> None:
        """Refuses a model whose gradients will not be there.

        Raises:
            ConfigurationError: A projection is frozen.
        """
        check_trained(self.match, self.kinds, "movement", lambda parts: parts)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the gradients of an optimizer step; a step whose gradients are missing or not finite is left out."""
        moves: dict[tuple[int, str], Tensor] = {}
        for layer, left in enumerate(structures.current_widths(self.match)):
            for kind in self.kinds:
                if not left[kind]:
                    continue
                total = None
                for part in slices(self.match, layer, kind):
                    for parameter in part.parameters():
                        if not parameter.requires_grad:
                            continue
                        if parameter.grad is None:
                            return
                        move = part.per_unit(parameter.grad * parameter)
                        total = move if total is None else total + move
                if total is not None:
                    moves[layer, kind] = -total
        self.observe(moves)

    def _merge(self, past: Tensor, value: Tensor) -> Tensor:
        return past + value

    def _nothing(self, past: Tensor) -> Tensor:
        return torch.zeros_like(past)

    def _correction(self) -> float:
        return 1.0

    def changes(self) -> Scores:
        """Returns the sums of each layer and kind, counted from the lowest."""
        found = super().changes()
        for layer, kept in enumerate(structures.current(self.match)):
            for kind in self.kinds:
                if kept[kind]:
                    lowest = min(found[layer][kind][unit] for unit in kept[kind])
                    for unit in kept[kind]:
                        found[layer][kind][unit] -= lowest
        return found


class RandomScores(Scorer):
    """Chance, to compare with: `layer_adaptive` scores of uniform numbers, drawn once, so that every event agrees."""

    def __init__(self, match: Match, kinds: tuple[str, ...]) -> None:
        super().__init__(match, kinds)
        self._seed = torch.initial_seed()  # the run's

    def scores(self) -> Scores:
        """Returns the scores."""
        generator = torch.Generator().manual_seed(self._seed)
        found: Scores = []
        for layer, (kept, sizes) in enumerate(
            zip(structures.current(self.match), structures.dimensions(self.match), strict=True)
        ):
            found.append({})
            for kind in self.kinds:
                drawn = torch.rand(sizes[kind], generator=generator).tolist()
                found[layer][kind] = layer_adaptive(drawn, kept[kind])
        return found

    def state_dict(self) -> dict[str, Any]:
        """Returns the seed."""
        return {"seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the seed of a run that is resumed."""
        self._seed = state["seed"]


class OwnScores(Scorer):
    """Scores of the user's own.

    Args:
        match: The model.
        kinds: The kinds of units to score.
        score: `(match, groups) -> Scores`: for each layer a number, 0 or above, of every unit of the dense model by
            kind; what units that are gone get does not matter.
    """

    def __init__(self, match: Match, kinds: tuple[str, ...], score: Callable[[Match, tuple[str, ...]], Scores]) -> None:
        super().__init__(match, kinds)
        self._score = score

    def scores(self) -> Scores:
        """Returns the scores.

        Raises:
            ConfigurationError: They are not of the model's shape, or not numbers of at least 0.
        """
        given = self._score(self.match, self.kinds)
        sizes = structures.dimensions(self.match)
        hint = "importance must return for each layer a mapping from each group to one number, 0 or above, per unit"
        if len(given) != len(sizes):
            raise ConfigurationError(f"{hint}: it returned {len(given)} layers for {len(sizes)}.")
        for index, (layer, size) in enumerate(zip(given, sizes, strict=True)):
            for kind in self.kinds:
                values = [float(value) for value in layer.get(kind, ())]
                if len(values) != size[kind]:
                    raise ConfigurationError(
                        f"{hint}: it returned {len(values)} numbers for the {size[kind]} {kind} of layer {index}."
                    )
                if wrong := [value for value in values if not (math.isfinite(value) and value >= 0)]:
                    raise ConfigurationError(f"{hint}: it returned {wrong[0]} for the {kind} of layer {index}.")
        return [{kind: [float(value) for value in layer[kind]] for kind in self.kinds} for layer in given]


METHODS: dict[str, type[Scorer]] = {
    "taylor": TaylorScores,
    "magnitude": MagnitudeScores,
    "activation": ActivationScores,
    "movement": MovementScores,
    "random": RandomScores,
}


def check_importance(importance: Any) -> None:
    """Refuses what is neither a method nor a callable.

    Raises:
        ConfigurationError: It is something else.
    """
    if not callable(importance) and importance not in METHODS:
        raise ConfigurationError(
            f"importance must be one of {', '.join(METHODS)}, or a callable (match, groups) -> scores; got"
            f" {importance!r}."
        )


def make_scorer(importance: ScoreBy, match: Match, kinds: tuple[str, ...]) -> Scorer:
    """Returns the scorer of a model.

    Args:
        importance: A name, or a callable.
        match: The model.
        kinds: The kinds of units to score.
    """
    return METHODS[importance](match, kinds) if isinstance(importance, str) else OwnScores(match, kinds, importance)
