from __future__ import annotations

import pytest
import torch

from adaptrain.pruning.families import find_family
from adaptrain.pruning.weight_masks import (
    masked_projections,
    pattern_mask,
    sizes_on_disk,
    unstructured_masks,
    zero_share,
)
from tests.pruning.models import MODELS
from tests.toys import tiny_bert


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_unstructured_masks_are_those_of_a_global_threshold(sparsity) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(6, 8), 3 * torch.randn(5, 8)]
    ranked = sorted(float(value) for weight in weights for value in weight.abs().flatten())
    gone = set(ranked[: round(sparsity * len(ranked))])
    for weight, mask in zip(weights, unstructured_masks(weights, sparsity), strict=True):
        expected = [[float(value) not in gone for value in row] for row in weight.abs()]
        assert mask.tolist() == expected


def test_a_pattern_keeps_the_largest_of_each_group() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.1, 0.2, -0.4, 0.3]])
    assert pattern_mask(weight, 2, 4).tolist() == [[False, True, True, False, False, False, True, True]]
    assert pattern_mask(weight, 1, 2).tolist() == [[False, True, True, False, False, True, True, False]]
    # The same matrix as GPT-2 holds it: inputs first.
    assert pattern_mask(weight.T.contiguous(), 2, 4, inputs_dim=0).tolist() == pattern_mask(weight, 2, 4).T.tolist()


def test_the_groups_that_lose_least_come_to_the_pattern_first() -> None:
    weight = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.1, 0.2, 0.4, 0.3]])
    assert pattern_mask(weight, 2, 4, share=0.5).tolist() == [[True] * 4 + [False, False, True, True]]
    assert pattern_mask(weight, 2, 4, share=0.0).all()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_family_has_matrices_to_mask_each_once(name) -> None:
    model = MODELS[name]()
    found = masked_projections(find_family(model))
    assert found
    held = [part.weight.data_ptr() for part in found.values()]
    assert len(set(held)) == len(held)
    assert {id(part.weight) for part in found.values()} <= {id(parameter) for parameter in model.parameters()}


def test_zeros_are_counted_and_compress() -> None:
    model = tiny_bert()
    parts = masked_projections(find_family(model)).values()
    dense = sizes_on_disk(model)
    assert zero_share(part.weight for part in parts) == 0
    for part, mask in zip(parts, unstructured_masks([part.weight for part in parts], 0.9), strict=True):
        part.weight.data.mul_(mask)
    sparse = sizes_on_disk(model)
    assert zero_share(part.weight for part in parts) == pytest.approx(0.9, abs=1e-3)
    assert sparse["size_bytes"] == dense["size_bytes"]
    assert sparse["compressed_bytes"] < 0.6 * dense["compressed_bytes"]
