"""What every text data module shares: tokenize once, cache, and serve batches in an order that can be resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch.utils.data import DataLoader

from adaptrain import _lightning
from adaptrain.errors import ConfigurationError
from adaptrain.nlp import tokenization
from adaptrain.nlp.cache import cached
from adaptrain.nlp.loader import Collator, ResumableLoader, ShuffledSampler, TokenDataset
from adaptrain.nlp.sources import SPLITS, RawText

log = logging.getLogger(__name__)

TASKS = ("classification", "language_model")


class Source(Protocol):
    """Where texts come from. Its `str` names it to a person."""

    def fingerprint(self) -> Mapping[str, Any]:
        """Returns what the text depends on, for caches."""
        ...

    def read(self, *, task: str, val_fraction: float, seed: int) -> RawText:
        """Returns the text."""
        ...


class TokenizedDataModule(_lightning.LightningDataModule):
    """Tokenizes text once, keeps it in memory and in a cache, and serves batches padded to their longest sample.

    Args:
        source: Where the text comes from.
        task: `"classification"`, or `"language_model"`: predict the next token.
        tokenizer: A Hugging Face name or folder; None: a byte-level BPE is trained on the training text.
        vocab_size: Tokens of the BPE that is trained.
        max_length: Longest sample in tokens (what is over is cut off); for language models the length of a sequence.
        batch_size: Samples in a training batch on one rank.
        eval_batch_size: Samples in a validation or test batch; None: as in training.
        num_workers: Processes that make batches; 0: the training process makes them, which is fast enough here.
        pad_to_multiple_of: Rounds the length of batches up, to `max_length` at most; `"auto"`: to a multiple of 8 where
            the trainer's precision is of 16 bits; None: no rounding.
        val_fraction: The share of the training samples held out where there is no validation data, in (0, 1).
        limit_train: Use that many training samples, chosen by the seed; None: all.
        limit_val: The same for validation.
        limit_test: The same for the test.
        seed: Of the order of the samples and of every choice above.

    Raises:
        ConfigurationError: An argument is out of its range; in `prepare_data` and `setup`: the text cannot be used.
    """

    def __init__(
        self,
        source: Source,
        *,
        task: str = "classification",
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        pad_to_multiple_of: int | Literal["auto"] | None = "auto",
        val_fraction: float = 0.1,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if task not in TASKS:
            raise ConfigurationError(f"data.task must be one of {', '.join(TASKS)}, got {task!r}.")
        limits = {"train": limit_train, "val": limit_val, "test": limit_test}
        _check_counts(
            # A classification sample has room for a token between its two special ones, a sequence for a next token.
            max_length=(max_length, 3 if task == "classification" else 2),
            batch_size=(batch_size, 1),
            eval_batch_size=(eval_batch_size, 1),
            num_workers=(num_workers, 0),
            pad_to_multiple_of=(None if pad_to_multiple_of == "auto" else pad_to_multiple_of, 1),
            **{f"limit_{split}": (limit, 1) for split, limit in limits.items()},
        )
        if not 0 < val_fraction < 1:
            raise ConfigurationError(f"data.val_fraction is a share and must be in (0, 1), got {val_fraction!r}.")
        self.source = source
        self.task = task
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self._tokenizer_name = tokenizer
        self._vocab_size = vocab_size
        self._num_workers = num_workers
        self._pad_to_multiple_of: int | Literal["auto"] | None = pad_to_multiple_of
        self._val_fraction = val_fraction
        self._limits = limits
        self._seed = seed
        self._entry: dict[str, Any] | None = None
        self._tokenizer: Any = None
        self._datasets: dict[str, TokenDataset] = {}
        self._loader: ResumableLoader | None = None
        self._resume: dict[str, int] | None = None

    def prepare_data(self) -> None:
        """Reads, checks and tokenizes, unless the cache has it."""
        if self._entry is not None:
            return
        pretrained = tokenization.load_tokenizer(self._tokenizer_name) if self._tokenizer_name is not None else None
        key = {
            "source": type(self.source).__name__,
            "content": self.source.fingerprint(),
            "task": self.task,
            "tokenizer": tokenization.tokenizer_fingerprint(pretrained) if pretrained else self._vocab_size,
            "max_length": self.max_length,
            "val_fraction": self._val_fraction,
            "seed": self._seed,
        }
        self._entry = cached(self.task, key, lambda: self._build(pretrained))
        self._tokenizer = pretrained or tokenization.wrap_tokenizer(self._entry["tokenizer"])
        for note in self._entry["notes"]:
            log.info(note)

    def _build(self, pretrained: Any) -> dict[str, Any]:
        raw = self.source.read(task=self.task, val_fraction=self._val_fraction, seed=self._seed)
        tokenizer: Any = pretrained
        if tokenizer is None:
            log.info("Training a tokenizer of %d tokens on the training text.", self._vocab_size)
            tokenizer = tokenization.train_tokenizer(raw.texts["train"], vocab_size=self._vocab_size)
        splits: dict[str, dict[str, torch.Tensor]] = {}
        for split in SPLITS:
            texts = raw.texts[split]
            if self.task == "language_model":
                documents = tokenization.encode(tokenizer, texts, max_length=None, what=split)
                tokens = tokenization.chunk(documents, length=self.max_length, separator=tokenizer.eos_token_id)
            else:
                tokens = tokenization.encode(tokenizer, texts, max_length=self.max_length, what=split)
            splits[split] = {"ids": tokens.ids, "offsets": tokens.offsets}
            if raw.labels:
                splits[split]["labels"] = torch.tensor(raw.labels[split])
        return {
            "splits": splits,
            "label_names": raw.label_names,
            "notes": raw.notes,
            "tokenizer": tokenizer.backend_tokenizer.to_str() if pretrained is None else None,
        }

    def setup(self, stage: str) -> None:
        """Makes the datasets of all splits; a second call changes nothing."""
        if self._datasets:
            return
        self.prepare_data()
        assert self._entry is not None
        for split, entry in self._entry["splits"].items():
            tokens = tokenization.TokenizedTexts(entry["ids"], entry["offsets"])
            limit = self._limits[split]
            keep = None
            if limit is not None:
                order = torch.randperm(len(tokens.lengths), generator=torch.Generator().manual_seed(self._seed))
                keep = order[:limit]
            self._datasets[split] = TokenDataset(tokens, entry.get("labels"), keep=keep)

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        self.prepare_data()
        return self._tokenizer

    @property
    def label_names(self) -> list[str]:
        """The classes, in the order of their indices; empty for language models."""
        self.prepare_data()
        assert self._entry is not None
        return list(self._entry["label_names"])

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return len(self.label_names)

    @property
    def median_length(self) -> int:
        """Tokens of the median training sample."""
        self.setup("fit")
        return int(self._datasets["train"].lengths.median())

    def describe(self) -> dict[str, Any]:
        """Returns what was loaded, as plain Python: source, task, samples and tokens by split, labels, notes."""
        self.setup("fit")
        assert self._entry is not None
        return {
            "source": str(self.source),
            "task": self.task,
            "samples": {split: len(dataset) for split, dataset in self._datasets.items()},
            "tokens": {split: int(dataset.lengths.sum()) for split, dataset in self._datasets.items()},
            "labels": self.label_names,
            "median_length": self.median_length,
            "max_length": self.max_length,
            "vocab_size": len(self.tokenizer),
            "tokenizer": self._tokenizer_name or "byte-level BPE trained on the training text",
            "notes": list(self._entry["notes"]),
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the training loader, at the place a loaded checkpoint was taken."""
        trainer: Any = self.trainer
        if trainer is not None and trainer.overfit_batches:  # the same few batches every epoch: nothing to resume
            return self._eval_loader("train", self.batch_size)
        dataset = self._datasets["train"]
        sampler = ShuffledSampler(
            dataset,
            seed=self._seed,
            world_size=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
        )
        self._loader = ResumableLoader(
            dataset,
            sampler=sampler,
            trained=partial(_lightning.batches_trained, trainer) if trainer is not None else None,
            batch_size=self.batch_size,
            **self._options(),
        )
        if self._resume is not None:
            self._loader.load_state_dict(self._resume)
        return self._loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the validation loader, in fixed order."""
        return self._eval_loader("val", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the test loader, in fixed order."""
        return self._eval_loader("test", self.eval_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Returns where in the epoch training is."""
        return {} if self._loader is None else {"loader": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there.

        Lightning restores a loader's state only where nothing asked for the number of training steps beforehand, as
        most schedulers do; a data module's is always restored.
        """
        self._resume = state_dict.get("loader")
        if self._loader is not None and self._resume is not None:
            self._loader.load_state_dict(self._resume)

    def _eval_loader(self, split: str, batch_size: int) -> DataLoader[Any]:
        # A generator of its own: starting an iteration draws a number, by default from the global one.
        generator = torch.Generator().manual_seed(self._seed)
        return DataLoader(self._datasets[split], batch_size=batch_size, generator=generator, **self._options())

    def _options(self) -> dict[str, Any]:
        multiple = _lightning.pads_to(self._pad_to_multiple_of, self.trainer)
        collator = Collator(self.tokenizer.pad_token_id, pad_to_multiple_of=multiple, max_length=self.max_length)
        return {
            "num_workers": self._num_workers,
            "persistent_workers": self._num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": collator,
        }


def _check_counts(**arguments: tuple[Any, int]) -> None:
    for name, (value, smallest) in arguments.items():
        if value is None and name not in ("max_length", "batch_size", "num_workers"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ConfigurationError(f"data.{name} must be a whole number of at least {smallest}, got {value!r}.")
