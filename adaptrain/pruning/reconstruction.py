"""What units that go have said, said by those that stay: least squares for the output projections of a cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import Match
from adaptrain.pruning.projections import Slice
from adaptrain.pruning.structure import Structure
from adaptrain.pruning.watch import OutputWatch, is_called, outputs

_TOKENS = 1024  # of a forward pass, or as many as a projection has inputs: more would tell hardly more
_RIDGE = 0.01  # of the mean second moment


@dataclass(frozen=True)
class Substitute:
    """What stands in for the removed inputs of one output projection.

    Args:
        kept: The inputs that stay, as indices among those held now.
        removed: The inputs that go.
        by: How much of each kept input, and of a constant 1 in the last column, stands in for each removed one; of
            shape (removed, kept + 1).
        lost: The share of the output's mean square that the removed inputs carried.
        left: The share that is still lost with what stands in for them.
    """

    kept: Tensor
    removed: Tensor
    by: Tensor
    lost: float
    left: float


class Reconstruction:
    """Lets the units that stay take over what those that go have said, before they are cut.

    With X the inputs of an output projection W on tokens of the last training steps, S the inputs that stay and R those
    that go, the new weights are those whose output is nearest to the old one's,

        min over W' of E‖W X − W' X_S‖² + λ‖W' − W_S‖²,   W' = W_S + W_R E[X_R X_Sᵀ] (E[X_S X_Sᵀ] + λI)⁻¹

    with a constant among X_S where the projection has a bias, and λ a hundredth of the mean of E[X_i²]. Units of a
    layer are much alike, so that this mends most of what a cut breaks; gradients of training mend the rest.

    Sources: the output-preserving updates of structured Optimal Brain Surgeon, as in Kurtic et al. 2023, "ZipLM:
    Inference-Aware Structured Pruning of Language Models" (arXiv:2302.04089), and the least squares of He et al. 2017,
    "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv:1707.06168).

    Args:
        match: The model.
        kinds: The kinds of units that are cut.
    """

    def __init__(self, match: Match, kinds: tuple[str, ...]) -> None:
        self.match = match
        self.kinds = kinds
        self._moments: dict[tuple[int, str], Tensor] = {}  # sums of x xᵀ, x with a constant 1 at its end
        self._stop: Callable[[], None] | None = None

    @property
    def seen(self) -> bool:
        """Whether it has begun to watch."""
        return bool(self._moments)

    def start(self) -> None:
        """Begins to watch forward passes of training. It takes a matrix of inputs by inputs for each projection."""
        if self._stop is None:
            for key, output in outputs(self.match, self.kinds).items():
                size = output.weight.shape[output.dim]
                if size and is_called(output):
                    exact = torch.promote_types(output.weight.dtype, torch.float32)
                    fresh = output.weight.new_zeros(size + 1, size + 1, dtype=exact)
                    self._moments[key] = self._moments[key].to(fresh) if key in self._moments else fresh
            self._stop = OutputWatch(self.match, self.kinds, self._see).start()

    def stop(self) -> None:
        """Ends watching, and forgets what was seen."""
        if self._stop is not None:
            self._stop()
        self._stop, self._moments = None, {}

    def _see(self, key: tuple[int, str], read: Tensor, mask: Tensor | None) -> None:
        moments = self._moments[key]
        if mask is not None and len(mask) == len(read):
            read = read[mask.bool()]
        most = max(_TOKENS, read.shape[-1])
        read = read[:: max(1, -(-len(read) // most))].to(moments.dtype)
        read = torch.cat([read, read.new_ones(len(read), 1)], dim=1)
        moments.addmm_(read.T, read)

    def reduce(self, reduce: Callable[[Tensor], Any]) -> None:
        """Lets all ranks have seen the same: `reduce` sums a tensor over them in place."""
        for moments in self._moments.values():
            reduce(moments)

    @torch.no_grad()
    def solve(self, keep: Structure) -> dict[tuple[int, str], Substitute]:
        """Returns what stands in for the units that `keep` leaves out, on the CPU; empty where nothing was seen.

        Args:
            keep: The units to keep, a subset of those that are left.
        """
        found = {}
        have = structures.current(self.match)
        for (layer, kind), output in outputs(self.match, self.kinds).items():
            old, new = have[layer][kind], keep[layer][kind]
            moments = self._moments.get((layer, kind))
            if new == old or structures.is_dropped(keep[layer]) or moments is None or not float(moments[-1, -1]) > 0:
                continue
            places = {unit: place for place, unit in enumerate(old)}
            kept = output.index([places[unit] for unit in new]).cpu()
            if (made := _substitute(output, moments.cpu().double(), kept)) is not None:
                found[layer, kind] = made
        return found

    def state_dict(self) -> dict[str, Any]:
        """Returns what was seen since watching began, for a run that is resumed before the cut."""
        return {"moments": [[*key, moments.clone()] for key, moments in self._moments.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what was seen before the run was interrupted; watching itself is yet to be started."""
        self._moments = {(layer, kind): moments for layer, kind, moments in state["moments"]}


def _substitute(output: Slice, moments: Tensor, kept: Tensor) -> Substitute | None:
    """Solves for one projection; None where its inputs are not finite, or say nothing."""
    moments = moments / moments[-1, -1].item()
    size = len(moments) - 1
    stays = torch.zeros(size, dtype=torch.bool)
    stays[kept] = True
    removed = (~stays).nonzero().flatten()
    constant = torch.tensor([size]) if output.projection.bias is not None else kept[:0]
    basis = torch.cat([kept, constant])
    ridge = _RIDGE * moments.diagonal()[:-1].mean()
    if not (moments.isfinite().all() and ridge > 0):
        return None
    by = torch.zeros(len(removed), len(kept) + 1, dtype=moments.dtype)
    if len(basis):
        penalty = torch.cat([ridge.expand(len(kept)), ridge.new_full((len(constant),), 1e-9)])
        normal = moments[basis][:, basis] + penalty.diag()
        by[:, : len(basis)] = torch.linalg.solve(normal, moments[basis][:, removed]).T
    weight = output.weight.detach().cpu().double()
    weight = weight if output.dim else weight.T  # (outputs, inputs)
    total = _mean_square(weight, moments[:size, :size])
    if not total > 0:
        return None
    change = torch.cat([weight[:, removed], -weight[:, removed] @ by], dim=1)
    order = torch.cat([removed, kept, torch.tensor([size])])
    return Substitute(
        kept=kept,
        removed=removed,
        by=by,
        lost=_mean_square(weight[:, removed], moments[removed][:, removed]) / total,
        left=_mean_square(change, moments[order][:, order]) / total,
    )


def _mean_square(weight: Tensor, moments: Tensor) -> float:
    return max(0.0, float(((weight @ moments) * weight).sum()))


@torch.no_grad()
def take_over(match: Match, substitutes: Mapping[tuple[int, str], Substitute]) -> None:
    """Adds what stands in for units that are about to go to the weights, and biases, of those that stay.

    Args:
        match: The model, or a copy of it such as a running average; before the cut.
        substitutes: What `Reconstruction.solve` returned.
    """
    held = outputs(match, tuple({kind for _, kind in substitutes}))
    for key, made in substitutes.items():
        output = held[key]
        weight = output.weight.data if output.dim else output.weight.data.T
        kept, removed = made.kept.to(weight.device), made.removed.to(weight.device)
        exact = torch.promote_types(weight.dtype, torch.float32)
        added = weight[:, removed].to(exact) @ made.by.to(weight.device, exact)
        weight[:, kept] += added[:, :-1].to(weight.dtype)
        if output.projection.bias is not None:
            output.projection.bias.data += added[:, -1].to(weight.dtype)
