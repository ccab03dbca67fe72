"""Small real models, data and trainers that the tests share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

VOCAB = 64
LABELS = 3


def tiny_bert(*, layers: int = 2, hidden: int = 32, heads: int = 4, ffn: int = 64, dropout: float = 0.0) -> Any:
    """A BERT classifier of about 20k parameters, the same weights at every call."""
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        max_position_embeddings=64,
        num_labels=LABELS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return BertForSequenceClassification(config)


def tiny_llama(
    *, layers: int = 2, hidden: int = 32, heads: int = 4, kv_heads: int = 2, ffn: int = 64, tie: bool = True
) -> Any:
    """A Llama language model with grouped queries, the same weights at every call."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(config)


def text_samples(count: int = 48, *, length: int = 16, variable: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """Padded token samples whose label can be learned: which third of the vocabulary the tokens come from."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        label = int(torch.randint(LABELS, (), generator=generator))
        span = (VOCAB - 4) // LABELS
        size = int(torch.randint(4, length + 1, (), generator=generator)) if variable else length
        ids = torch.zeros(length, dtype=torch.long)
        ids[:size] = 4 + label * span + torch.randint(span, (size,), generator=generator)
        mask = (torch.arange(length) < size).long()
        samples.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(label)})
    return samples


def language_model_samples(count: int = 48, *, length: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """The same tokens with themselves as labels, -100 where padded."""
    samples = text_samples(count, length=length, seed=seed)
    for sample in samples:
        sample["labels"] = sample["input_ids"].masked_fill(sample["attention_mask"] == 0, -100)
    return samples


def text_loader(samples: Sequence[Any] | None = None, *, batch_size: int = 8, **kwargs: Any) -> DataLoader:
    """A loader in fixed order unless told otherwise."""
    return DataLoader(samples if samples is not None else text_samples(), batch_size=batch_size, **kwargs)  # type: ignore[arg-type]


class TextModule(pl.LightningModule):
    """An ordinary module around a Hugging Face model; `losses` keeps every training loss."""

    def __init__(self, model: Any | None = None, *, lr: float = 1e-2, optimizer: str = "AdamW") -> None:
        super().__init__()
        self.model = model if model is not None else tiny_bert()
        self.lr = lr
        self.optimizer_name = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer_name)(self.parameters(), lr=self.lr)


class ValidatedTextModule(TextModule):
    """The same with a validation step; Lightning warns where a loader for it is missing."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch).loss)


def quiet_trainer(root: Path, *, namespace: Any = pl, **kwargs: Any) -> Any:
    """A CPU trainer of either Lightning namespace that prints and saves nothing unless asked."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": root,
        "max_epochs": 1,
    }
    return namespace.Trainer(**(settings | kwargs))


def weights(module: torch.nn.Module) -> torch.Tensor:
    """All parameters as one flat vector."""
    return torch.cat([parameter.detach().flatten().double() for parameter in module.parameters()])


def join_ranks(rank: int, port: int) -> None:
    """Makes this process one of two ranks that talk over the loopback device."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
