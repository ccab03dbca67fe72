"""A loader whose order is its own, and which goes on in the middle of an epoch after a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from adaptrain.errors import ConfigurationError
from adaptrain.nlp.tokenization import TokenizedTexts

IGNORED = -100
"""The label that losses leave out, by convention of torch and transformers."""


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Samples of token ids.

    Args:
        texts: The tokens.
        labels: The class of each text, shape (texts,); None for language modelling, where the tokens are the labels.
        keep: Indices of the texts to use, in this order; None: all.
    """

    def __init__(self, texts: TokenizedTexts, labels: Tensor | None = None, *, keep: Tensor | None = None) -> None:
        self.texts = texts
        self.labels = labels
        self.keep = keep

    def __len__(self) -> int:
        return len(self.texts.offsets) - 1 if self.keep is None else len(self.keep)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no sample {index}; there are {len(self)}.")  # ends `for sample in dataset`
        index %= len(self)
        row = index if self.keep is None else int(self.keep[index])
        start, end = self.texts.offsets[row : row + 2].tolist()
        sample = {"input_ids": self.texts.ids[start:end]}
        if self.labels is not None:
            sample["labels"] = self.labels[row]
        return sample

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample, shape (samples,)."""
        return self.texts.lengths if self.keep is None else self.texts.lengths[self.keep]


class Collator:
    """Makes a batch, padded on the right to its longest sample.

    The batch is a dict of int64 tensors: `input_ids` and `attention_mask` of shape (samples, tokens), and `labels` of
    shape (samples,) or, for language modelling, (samples, tokens) with -100 where padded.

    Args:
        pad_token_id: The id to pad with.
        pad_to_multiple_of: Rounds the length up to a multiple of this, for tensor cores; None: no rounding.
        max_length: The most it is rounded up to: a model may have no more positions.
    """

    def __init__(
        self, pad_token_id: int, *, pad_to_multiple_of: int | None = None, max_length: int | None = None
    ) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = max_length

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the batch of `samples`."""
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        width = int(lengths.max())
        if self.pad_to_multiple_of:
            rounded = width + -width % self.pad_to_multiple_of
            width = max(width, min(rounded, self.max_length or rounded))
        input_ids = torch.full((len(samples), width), self.pad_token_id)
        for row, sample in zip(input_ids, samples, strict=True):
            row[: len(sample["input_ids"])] = sample["input_ids"]
        attention_mask = (torch.arange(width) < lengths[:, None]).long()
        if "labels" in samples[0]:
            labels = torch.stack([sample["labels"] for sample in samples])
        else:
            labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class ShuffledSampler(DistributedSampler[int]):
    """Every sample once an epoch, in an order of its own that depends on the seed and the epoch alone.

    Under several ranks each gets its share; Lightning leaves a distributed sampler in its place.

    Args:
        dataset: The samples.
        seed: Of the order; the global random state is neither read nor changed.
        world_size: Processes that share the samples.
        rank: This process.
    """

    def __init__(self, dataset: Dataset[Any], *, seed: int, world_size: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self.skip :])


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over a `ShuffledSampler` that can go on in the middle of an epoch.

    Its state is the epoch and the number of batches trained on. Once loaded, the next iteration over the same epoch
    begins after them; any other epoch begins at its start. `len` is always the whole epoch. It may have workers:
    batches that are prefetched but not yet trained on do not count.

    Args:
        dataset: The samples.
        sampler: Their order.
        trained: Tells how many batches of this epoch were trained on; None: those handed out.
        **kwargs: As for `DataLoader`.
    """

    order_is_samplers = True
    """Its order is its sampler's alone: another batch sampler over that, with its own place, may serve instead."""

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        sampler: ShuffledSampler,
        trained: Callable[[], int] | None = None,
        **kwargs: Any,
    ) -> None:
        # Its own generator: starting an iteration draws a number, by default from the global one.
        generator = torch.Generator().manual_seed(sampler.seed)
        super().__init__(dataset, sampler=sampler, generator=generator, **kwargs)
        self._order = sampler
        self._trained = trained
        self._handed_out = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # As a generator it starts at its first batch: only then has Lightning set the epoch and restored the state.
        resume, self._resume = self._resume, None
        start = resume["batches"] if resume and resume["epoch"] == self._order.epoch else 0
        self._handed_out = start
        self._order.skip = start * (self.batch_size or 1)
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch and how many of its batches were trained on."""
        if self._resume is not None:
            return dict(self._resume)
        batches = self._handed_out if self._trained is None else self._trained()
        return {"epoch": self._order.epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration go on where `state` was taken.

        Raises:
            ConfigurationError: It was taken while the batch size was adapted, and batches do not tell the place.
        """
        if "batches" not in state:
            raise ConfigurationError(
                "The checkpoint was written in a run with global_batch_size. Resume with it, or begin anew."
            )
        self._resume = dict(state)
