"""What units say while a model trains: the inputs of the output projections, seen in passing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from adaptrain.pruning.family import Match
from adaptrain.pruning.projections import Slice
from adaptrain.pruning.surgery import slices


def outputs(match: Match, kinds: tuple[str, ...]) -> dict[tuple[int, str], Slice]:
    """Returns the output projection of each layer and kind that has one."""
    found = {}
    for layer in range(len(match.layers)):
        for kind in kinds:
            if parts := slices(match, layer, kind):
                found[layer, kind] = parts[-1]
    return found


def is_called(output: Slice) -> bool:
    """Whether an output projection is called as a module; `nn.MultiheadAttention` does not call its own."""
    return not isinstance(output.linear, NonDynamicallyQuantizableLinear)


class OutputWatch:
    """Shows what output projections read in the forward passes of training.

    Args:
        match: The model.
        kinds: The kinds of units whose output projections are watched.
        see: Called with the layer and kind, what the projection reads, of shape (tokens, inputs), and the tokens that
            are not padding, of shape (tokens,) as 0 and 1: None where the model was given no mask, and of another
            length where the mask is not one of (samples, tokens).
    """

    def __init__(
        self,
        match: Match,
        kinds: tuple[str, ...],
        see: Callable[[tuple[int, str], Tensor, Tensor | None], None],
    ) -> None:
        self._match = match
        self._kinds = kinds
        self._see = see
        self._mask: Tensor | None = None
        self._watching = False

    def start(self) -> Callable[[], None]:
        """Hooks into the forward passes, which compute the same as before; returns what ends it."""
        handles = [self._match.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for key, output in outputs(self._match, self._kinds).items():
            if is_called(output):

                def show(_: Any, inputs: Any, key: tuple[int, str] = key) -> None:
                    self._show(key, inputs[0])

                handles.append(output.linear.register_forward_pre_hook(show))

        def stop() -> None:
            for handle in handles:
                handle.remove()
            handles.clear()
            self._mask = None

        return stop

    def _begin(self, model: Any, args: Any, kwargs: Any) -> None:
        self._watching = model.training and torch.is_grad_enabled()
        mask = kwargs.get("attention_mask")
        if mask is None and args:
            mask = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        self._mask = mask

    @torch.no_grad()
    def _show(self, key: tuple[int, str], read: Tensor) -> None:
        if self._watching and read.shape[-1]:
            with torch.autocast(read.device.type, enabled=False):  # sums over many tokens are to be exact
                self._see(key, read.detach().flatten(0, -2), None if self._mask is None else self._mask.flatten())
