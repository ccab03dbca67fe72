"""Zeros in place of single weights: which ones, and what they buy."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.pruning.checks import projections
from adaptrain.pruning.family import Match
from adaptrain.pruning.projections import Projection, projection

_LEVEL = 1  # of zlib: zeros are found at any level, and more finds little else in floats


def masked_projections(match: Match) -> dict[str, Projection]:
    """Returns by name the matrices whose weights may become zero: those of attention and feed-forward layers."""
    found = {}
    for index, layer in enumerate(match.layers):
        for path in projections(match.family):
            part = projection(layer, path)
            if part is not None and part.weight.numel():
                found[f"layer {index}, {path}"] = part
    return found


@torch.no_grad()
def unstructured_masks(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Returns which weights stay when the smallest ones go, ranked over all matrices.

    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks"; ranked globally.

    Args:
        weights: The matrices. What is zero already is the smallest and stays zero.
        sparsity: The share of all weights that goes, in [0, 1].

    Returns:
        True where a weight stays, for each matrix in its shape.
    """
    sizes = torch.cat([weight.detach().abs().flatten() for weight in weights])
    kept = torch.ones(len(sizes), dtype=torch.bool, device=sizes.device)
    kept[sizes.topk(round(sparsity * len(sizes)), largest=False, sorted=False).indices] = False
    parts = kept.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


@torch.no_grad()
def pattern_mask(weight: Tensor, n: int, m: int, *, share: float = 1.0, inputs_dim: int = 1) -> Tensor:
    """Returns which weights stay when of every m along the inputs only the n largest do.

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (2:4).

    Args:
        weight: A matrix whose inputs are a multiple of m.
        n: Weights that stay in each group.
        m: Weights in a group.
        share: Of the groups that are brought to the pattern, in [0, 1]; those that lose least come first.
        inputs_dim: The dimension of the inputs.

    Returns:
        True where a weight stays, in the shape of the matrix.
    """
    groups = weight.detach().transpose(inputs_dim, 1).reshape(-1, m).abs()
    smallest = groups.topk(m - n, dim=1, largest=False)
    lost = smallest.values.sum(1)
    due = lost.topk(round(share * len(groups)), largest=False, sorted=False).indices
    kept = torch.ones_like(groups, dtype=torch.bool)
    kept[due] = kept[due].scatter(1, smallest.indices[due], False)
    turned = weight.transpose(inputs_dim, 1)
    return kept.view(turned.shape).transpose(inputs_dim, 1)


def zero_share(weights: Iterable[Tensor]) -> float:
    """Returns the share of zeros."""
    held = list(weights)
    return sum(int((weight == 0).sum()) for weight in held) / max(1, sum(weight.numel() for weight in held))


def sizes_on_disk(model: nn.Module) -> dict[str, int]:
    """Returns the bytes of the weights as they are, and as a compressing file format stores them."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}  # tied ones once
    packed = zlib.compressobj(_LEVEL)
    plain = small = 0
    for tensor in tensors.values():
        data: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        plain += len(data)
        small += len(packed.compress(data))
    return {"size_bytes": plain, "compressed_bytes": small + len(packed.flush())}
