"""Dropout that follows the size of what it regularizes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import KINDS, Match
from adaptrain.pruning.surgery import slices

_DENSE = "_adaptrain_dense_dropout"  # on a module: its rates before anything was cut, by attribute
_RATES = ("dropout", "attention_dropout")  # where modules that call the function keep the rate


def scale_dropout(match: Match, *, followed: bool = False) -> None:
    """Sets the rates of all dropout inside of the model's layers to what the layers' size asks for.

        p = p_dense·√(c/c_dense)

    with c the entries of the matrices that hold a layer's units. A layer that can do less needs less to keep it from
    learning by heart. Calling it again changes nothing.

    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3.2.

    Args:
        match: The model, as it is now.
        followed: Only where it was done before, on the same modules.
    """
    for index, (layer, sizes) in enumerate(zip(match.layers, structures.dimensions(match), strict=True)):
        now = dense = 0
        for kind in KINDS:
            for part in slices(match, index, kind):
                now += part.weight.numel()
                dense += part.weight.shape[1 - part.dim] * part.size * part.fused * sizes[kind]
        for module, name in _rates(layer):
            holder = getattr(module, "replaced", module)  # stand-ins come and go
            if followed and not hasattr(holder, _DENSE):
                continue
            known = holder.__dict__.setdefault(_DENSE, {})
            setattr(module, name, known.setdefault(name, getattr(module, name)) * math.sqrt(now / max(1, dense)))


def _rates(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yields the modules of a layer that drop something, each with the attribute that says how much."""
    for module in layer.modules():
        for name in ("p",) if isinstance(module, _DropoutNd) else _RATES:
            if isinstance(getattr(module, name, None), float):
                yield module, name
