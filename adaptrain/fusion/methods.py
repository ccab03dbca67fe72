"""Ways to merge the weights of models, tensor by tensor; each as its paper defines it.

Tensors come in the precision to compute in. `models` are of one shape, and so is `base`, the weights they were all
fine-tuned from. A task vector is what fine-tuning changed: model − base.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_PARALLEL = 0.9995  # cosines above: the arc and the chord are the same, and sin Ω is too small to divide by


def average(models: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Returns the mean, or the weighted mean.

    Source: Wortsman et al. 2022, "Model soups" (uniform soup).
    """
    shares = [1 / len(models)] * len(models) if weights is None else [weight / sum(weights) for weight in weights]
    merged = models[0] * shares[0]
    for model, share in zip(models[1:], shares[1:], strict=True):
        merged += model * share
    return merged


def wise_ft(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """Returns (1 − α)·base + α·tuned.

    Source: Wortsman et al. 2021, "Robust fine-tuning of zero-shot models".
    """
    return base * (1 - alpha) + tuned * alpha


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Returns the point at `t` of the arc between two tensors, (sin((1−t)Ω)·a + sin(tΩ)·b) / sin Ω.

    Ω is the angle between them. Where they are nearly parallel, or one is zero, it is the point of the chord.

    Source: Shoemake 1985, "Animating Rotation with Quaternion Curves".
    """
    norms = first.norm() * second.norm()
    cosine = float((first * second).sum() / norms) if norms > 0 else 1.0
    if abs(cosine) > _PARALLEL:
        return first * (1 - t) + second * t
    angle = torch.arccos(torch.tensor(cosine, dtype=first.dtype))
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)


def task_arithmetic(base: Tensor, models: Sequence[Tensor], scaling: float) -> Tensor:
    """Returns base + λ·Σ task vectors.

    Source: Ilharco et al. 2023, "Editing Models with Task Arithmetic".
    """
    merged = base.clone()
    for model in models:
        merged += scaling * (model - base)
    return merged


def ties(base: Tensor, models: Sequence[Tensor], thresholds: Sequence[float], scaling: float) -> Tensor:
    """Returns base + λ·τ, where task vectors are trimmed, agree on a sign, and only those that have it are averaged.

    Source: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models".

    Args:
        base: The weights before fine-tuning.
        models: The models.
        thresholds: For each model the size below which what fine-tuning changed is dropped.
        scaling: λ.
    """
    vectors = [model - base for model in models]
    trimmed = torch.stack([v * (v.abs() >= limit) for v, limit in zip(vectors, thresholds, strict=True)])
    sign = trimmed.sum(0).sign()
    agreeing = trimmed * ((trimmed.sign() == sign) & (trimmed != 0))
    return base + scaling * agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1)


def dare(base: Tensor, models: Sequence[Tensor], density: float, scaling: float, generator: torch.Generator) -> Tensor:
    """Returns base + λ·Σ task vectors of which all but a random share is dropped and the rest divided by that share.

    Source: Yu et al. 2024, "Language Models are Super Mario" (DARE, with task arithmetic).
    """
    merged = base.clone()
    for model in models:
        kept = torch.rand(base.shape, generator=generator).to(base.device) < density
        merged += scaling / density * (model - base) * kept
    return merged


def model_stock(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """Returns t·mean + (1 − t)·base with t = N·cos θ / (1 + (N − 1)·cos θ), θ the angle between task vectors.

    The angle is the mean over all pairs, and no less than a right one.

    Source: Jang et al. 2024, "Model Stock: All we need is just a few fine-tuned models".
    """
    vectors = [(model - base).flatten() for model in models]
    cosines = [float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(vectors, 2)]
    cosine = max(0.0, sum(cosines) / len(cosines))
    share = len(models) * cosine / (1 + (len(models) - 1) * cosine)
    return wise_ft(base, average(models), share)
