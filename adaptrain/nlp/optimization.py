"""The optimizer of the text models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from adaptrain.errors import ConfigurationError


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Returns AdamW, fused on a CPU, that decays matrices alone: biases and the scales of norms are left to the data.

    Args:
        model: Its parameters that require a gradient are trained.
        lr: Peak learning rate, above 0.
        weight_decay: Decay of the matrices, 0 or above.
        betas: Decay rates of the moments, in [0, 1).

    Raises:
        ConfigurationError: An argument is out of its range.
    """
    if not (_is_number(lr) and lr > 0):
        raise ConfigurationError(f"model.lr must be greater than 0, got {lr!r}.")
    if not (_is_number(weight_decay) and weight_decay >= 0):
        raise ConfigurationError(f"model.weight_decay must be 0 or greater, got {weight_decay!r}.")
    if len(betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ConfigurationError(f"model.betas must be two numbers in [0, 1), got {list(betas)!r}.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if any(p.device.type != "cpu" for p in parameters):
        return torch.optim.AdamW(groups, lr=lr, betas=betas)
    # On a CPU the default takes five times as long: it reads and writes every weight a dozen times.
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    optimizer._step_supports_amp_scaling = False  # it need not unscale: Lightning does, to clip
    return optimizer


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
