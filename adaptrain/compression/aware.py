"""Training on weights as they will be held: quantization-aware training."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptrain.compression import int4, int8
from adaptrain.compression.layers import roundable
from adaptrain.pruning.projections import is_transposed

Round = Callable[[Tensor], Tensor]

AWARE_METHODS = ("int8_dynamic", "int8_weight", "int4_weight")


def train_rounded(model: nn.Module, method: str) -> Callable[[], None]:
    """Lets a model compute as `quantize(model, method)` would, while its weights stay in full precision and train.

    Each linear layer and embedding rounds its weights whenever it runs, in evaluation too; with `int8_dynamic` a linear
    layer's inputs as well. Gradients pass as if nothing was rounded (the straight-through estimator). Parameters stay
    where and what they are, so that optimizers, checkpoints and pruning see no difference.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference"; the estimator: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".

    Args:
        model: The model.
        method: One of `AWARE_METHODS`.

    Returns:
        What ends it.
    """
    rounding = int4.rounded_to_groups if method == "int4_weight" else int8.rounded_to_rows
    changed: list[nn.Module] = []
    for _, _, module in roundable(model):
        if "forward" in module.__dict__:
            continue  # a layer that is held in two places, or one that someone else runs in another way
        module.__dict__["forward"] = MethodType(_forward(module, rounding, dynamic=method == "int8_dynamic"), module)
        changed.append(module)

    def stop() -> None:
        for module in changed:
            module.__dict__.pop("forward", None)
        changed.clear()

    return stop


def _forward(module: nn.Module, rounding: Round, *, dynamic: bool) -> Callable[[Any, Tensor], Tensor]:
    if isinstance(module, nn.Embedding):
        return lambda layer, ids: _straight_through(
            nn.Embedding.forward(layer, ids), rounding
        )  # entries, not the table

    def forward(layer: Any, inputs: Tensor) -> Tensor:
        weight = _straight_through(layer.weight.T if is_transposed(layer) else layer.weight, rounding)
        return F.linear(_straight_through(inputs, rounded_inputs) if dynamic else inputs, weight, layer.bias)

    return forward


def rounded_inputs(inputs: Tensor) -> Tensor:
    """Returns inputs as torch's integer kernel rounds them: 127 steps from the least (or 0) to the greatest (or 0)."""
    exact = inputs.detach().float()
    low, high = exact.amin().clamp(max=0), exact.amax().clamp(min=0)
    step = ((high - low) / 127).clamp_min(torch.finfo(torch.float32).tiny * 2**8)
    zero = (-low / step).round().clamp(0, 127)
    return (((exact / step).round() + zero).clamp(0, 127) - zero).mul(step).to(inputs.dtype)


def _straight_through(values: Tensor, rounding: Round) -> Tensor:
    """Rounds, over the last dimension where it goes by rows; its gradient is that of the values themselves."""
    with torch.no_grad():
        rounded = rounding(values.reshape(-1, values.shape[-1])).view(values.shape) if values.numel() else values
    return rounded + (values - values.detach())  # in this order nothing is lost: the difference is 0
