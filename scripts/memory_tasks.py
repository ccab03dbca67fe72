"""What the memory benchmark trains: a pretrained encoder on sentences of all lengths, and a small language model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from quiet import quiet_trainer
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from adaptrain.nlp.datamodules import CorpusDataModule, TextDataModule
from adaptrain.nlp.modules import CausalLanguageModel, TextClassifier

_FOLDER = tempfile.TemporaryDirectory()  # of the runs' decision logs; gone at exit


@dataclass(frozen=True)
class Task:
    """A model and its training data.

    Args:
        model: A folder with a pretrained encoder; None: the language model from scratch.
        train_file: Labelled sentences for the encoder.
    """

    model: str | None = None
    train_file: Path | None = None

    @property
    def name(self) -> str:
        return "language_model" if self.model is None else "encoder"

    @cached_property
    def data(self) -> Any:
        if self.model is None:
            data: Any = CorpusDataModule(task="language_model", vocab_size=4096, max_length=128)
        else:
            data = TextDataModule(train_file=self.train_file, tokenizer=self.model, max_length=64)
        data.setup("fit")
        return data

    def module(self, *, dropout: bool = True) -> Any:
        torch.manual_seed(0)
        if self.model is None:
            return CausalLanguageModel(data=self.data)
        module = TextClassifier(data=self.data, name_or_path=self.model, lr=2e-5, schedule="constant", warmup=0.0)
        if not dropout:
            for part in module.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
        return module

    def loader(self, batch_size: int, *, seed: int, grouped: bool = False, width: int | None = None) -> DataLoader[Any]:
        """Returns endless whole batches; `grouped`: samples of like length together; `width`: padded to that."""
        source = self.data.train_dataloader()
        generator = torch.Generator().manual_seed(seed)
        lengths = source.dataset.lengths.tolist()
        if grouped:
            order: Any = LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)
        else:
            order = torch.utils.data.RandomSampler(lengths, generator=generator)
        collate = source.collate_fn if width is None else _Wide(source.collate_fn, width)
        return DataLoader(
            source.dataset, batch_size=batch_size, sampler=_Endless(order), collate_fn=collate, drop_last=True
        )


class _Endless(Sampler[int]):
    def __init__(self, order: Sampler[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from self.order


class _Wide:
    """Samples cut or filled to one length, so that nothing can be trimmed."""

    def __init__(self, collate: Any, width: int) -> None:
        self.collate, self.width = collate, width

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> Any:
        repeats = [{**s, "input_ids": s["input_ids"].repeat(self.width)[: self.width]} for s in samples]
        return self.collate(repeats)


def fit(module: Any, loader: Any, *callbacks: Any, steps: int, **settings: Any) -> Any:
    """Trains for some steps, silently, and returns the trainer."""
    usual = {"accelerator": "auto", "max_steps": steps, "max_epochs": -1, "callbacks": list(callbacks)}
    trainer = quiet_trainer(_FOLDER.name, **(usual | settings))
    trainer.fit(module, loader)
    return trainer
