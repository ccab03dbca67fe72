from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from adaptrain import ConfigurationError
from adaptrain.pruning.shape import typical_shape
from tests.toys import text_loader, text_samples


def pad(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)}


def test_the_median_of_padded_lengths() -> None:
    samples = [torch.ones(5, dtype=torch.long)] * 30 + [torch.ones(9, dtype=torch.long)] * 50
    assert typical_shape(DataLoader(samples, batch_size=10, collate_fn=pad)) == (10, 9)  # type: ignore[arg-type]


def test_fixed_length_samples_and_tuples() -> None:
    assert typical_shape(DataLoader(text_samples(20), batch_size=8)) == (8, 16)  # type: ignore[arg-type]
    data = TensorDataset(torch.ones(12, 7, dtype=torch.long), torch.zeros(12))
    assert typical_shape(DataLoader(data, batch_size=4)) == (4, 7)


def test_a_dataset_smaller_than_a_batch() -> None:
    assert typical_shape(DataLoader(text_samples(3), batch_size=8)) == (3, 16)  # type: ignore[arg-type]


class Random(torch.utils.data.Dataset):
    """Draws from every generator at each access."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randint(9, (random.randint(4, 8) + np.random.randint(1),))


def test_training_sees_the_same_batches_as_without_it() -> None:
    def first(peek: bool) -> Any:
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        loader = DataLoader(Random(), batch_size=4, shuffle=True, collate_fn=pad)
        if peek:
            typical_shape(loader)
        return [batch["input_ids"].tolist() for batch in loader]

    assert first(True) == first(False)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(text_samples(4))


@pytest.mark.parametrize(
    ("loader", "seen"),
    [
        (DataLoader(Stream(), batch_size=2), "a DataLoader over Stream:"),
        ([torch.ones(2, 2)], "a list of loaders:"),
        ({"reviews": text_loader()}, "a dict of loaders:"),
        (None, "a NoneType:"),
    ],
)
def test_where_it_cannot_be_read_it_says_what_it_saw_and_asks_for_it(loader, seen) -> None:
    with pytest.raises(ConfigurationError, match=f"from {seen}.*latency_input="):
        typical_shape(loader)


def test_batches_without_tokens() -> None:
    with pytest.raises(ConfigurationError, match="no token ids"):
        typical_shape(DataLoader([{"x": 1.0}] * 8, batch_size=2))  # type: ignore[arg-type]
