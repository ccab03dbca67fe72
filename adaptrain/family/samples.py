"""Validation samples that stay with a family, so that a cascade can be chosen, judged and timed on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VALIDATION_FILE = "validation.safetensors"


@dataclass(frozen=True)
class Samples:
    """Token ids and classes.

    Args:
        ids: The token ids of each sample, each of shape (tokens,).
        labels: The class of each, int64, shape (samples,).
    """

    ids: list[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def pick(self, indices: Tensor) -> Samples:
        """Returns some of the samples."""
        return Samples([self.ids[int(index)] for index in indices], self.labels[indices])

    def halves(self) -> tuple[Tensor, Tensor]:
        """Returns the indices of two halves, by chance but always the same."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        return order[: len(self) // 2], order[len(self) // 2 :]


def gather(loader: Any, limit: int) -> Samples | None:
    """Returns the first samples of a loader of labelled token batches; None where it yields others.

    Args:
        loader: Yields mappings with `input_ids`, `labels` of shape (samples,), and `attention_mask` where padded.
        limit: The most samples.
    """
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in loader:
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        classes = batch.get("labels") if isinstance(batch, Mapping) else None
        if not (isinstance(tokens, Tensor) and isinstance(classes, Tensor)) or classes.shape != tokens.shape[:1]:
            return None
        mask = batch.get("attention_mask")
        for row, sample in enumerate(tokens.cpu()):
            ids.append(sample if mask is None else sample[mask[row].cpu() != 0])
        labels.append(classes.cpu())
        if len(ids) >= limit:
            break
    return Samples(ids[:limit], torch.cat(labels)[:limit].long()) if ids else None


def save(samples: Samples, folder: Path) -> None:
    """Writes samples into a family's folder."""
    from safetensors.torch import save

    tensors = {
        "ids": torch.cat(samples.ids).int(),
        "lengths": torch.tensor([len(ids) for ids in samples.ids]),
        "labels": samples.labels,
    }
    partial = folder / f"{VALIDATION_FILE}.partial"
    partial.write_bytes(save(tensors))
    partial.replace(folder / VALIDATION_FILE)


def load(folder: Path) -> Samples | None:
    """Reads what `save` wrote; None where there is nothing."""
    from safetensors.torch import load_file

    if not (folder / VALIDATION_FILE).is_file():
        return None
    tensors = load_file(str(folder / VALIDATION_FILE))
    return Samples(list(tensors["ids"].long().split(tensors["lengths"].tolist())), tensors["labels"])
