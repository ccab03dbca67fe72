"""Gradients of large embeddings, added row by row where a gradient is already there."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from adaptrain._lightning.structure import is_compiled

_LARGE = 2**20  # elements: below, a dense gradient costs next to nothing


class SparseAccumulation:
    """Lets micro-batches after the first add only the rows of an embedding that they used.

    The gradient of an `nn.Embedding` is a dense tensor of the whole vocabulary for every micro-batch, mostly zeros that
    are written and added each time: with 30,000 rows more than a small encoder's feed-forward part takes. With
    `sparse=True` autograd adds the rows that were used to the gradient that is there. What optimizers, clipping and
    hooks see stays the dense sum; the first micro-batch makes it.

    Only where that is the same up to the order of sums and pays: on the CPU, in float32 or float64, for parameters
    that no other module shares and no hook watches.

    Args:
        module: The module that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        uses = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)
        compiled = is_compiled(module)
        self._embeddings = [
            part
            for part in module.modules()
            if type(part) is nn.Embedding and not compiled and uses[id(part.weight)] == 1 and _is_plain(part)
        ]

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Covers a micro-batch's forward and backward pass."""
        added = [part for part in self._embeddings if part.weight.grad is not None and _is_unwatched(part.weight)]
        for part in added:
            part.sparse = True
        try:
            yield
        finally:
            for part in added:
                part.sparse = False


def _is_plain(part: nn.Embedding) -> bool:
    weight = part.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and weight.numel() >= _LARGE
        and not part.sparse
        and not part.scale_grad_by_freq
    )


def _is_unwatched(weight: torch.Tensor) -> bool:
    return not (weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))
