"""An ordinary Lightning project that gains adaptrain's callbacks in three lines (marked `<-`).

It tells which of three standard-library packages a few lines of source come from, byte by byte, with a small BERT.
Nothing but the marked lines knows adaptrain. Run it with `python examples/plug_into_existing_project.py`; about a
minute on two CPU cores.
"""

import argparse
import sysconfig
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification

import adaptrain  # <- one: import it

PACKAGES = ("asyncio", "email", "tkinter")
LENGTH = 96


class SourceSnippets(Dataset):
    """Snippets of `LENGTH` bytes from every other file of each package (odd files validate)."""

    def __init__(self, remainder: int) -> None:
        self.samples = []
        for label, package in enumerate(PACKAGES):
            files = sorted(Path(sysconfig.get_paths()["stdlib"], package).glob("*.py"))
            for path in files[remainder::2]:
                data = path.read_bytes()
                self.samples += [(data[i : i + LENGTH], label) for i in range(0, len(data) - 32, LENGTH)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        data, label = self.samples[index]
        ids = torch.zeros(LENGTH, dtype=torch.long)
        ids[: len(data)] = torch.tensor(list(data)) + 1
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor(label)}


class SnippetClassifier(pl.LightningModule):
    """The user's module: plain AdamW, plain cosine schedule."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=257,
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            intermediate_size=384,
            max_position_embeddings=LENGTH,
        )
        config.num_labels = len(PACKAGES)
        self.model = BertForSequenceClassification(config)
        self.accuracy = MulticlassAccuracy(num_classes=len(PACKAGES), average="micro")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        output = self.model(**batch)
        self.accuracy(output.logits, batch["labels"])
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:  # type: ignore[override]
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="training epochs (default: 4)")
    parser.add_argument("--limit-batches", type=int, default=None, help="batches an epoch, for a quick look")
    args = parser.parse_args()

    pl.seed_everything(0)
    train = DataLoader(SourceSnippets(0), batch_size=64, shuffle=True)
    val = DataLoader(SourceSnippets(1), batch_size=64)
    module = SnippetClassifier()
    before = sum(parameter.numel() for parameter in module.parameters())

    pruning = adaptrain.ProgressivePruning(target={"flops": 0.5})  # <- two: say what the final model may cost
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=args.epochs,
        limit_train_batches=args.limit_batches,
        limit_val_batches=args.limit_batches,
        default_root_dir="runs/plug_in",
        callbacks=[adaptrain.BatchSizeController(), adaptrain.LearningRateController(), pruning],  # <- three: add them
    )
    trainer.fit(module, train, val)

    after = sum(parameter.numel() for parameter in module.parameters())
    accuracy = float(trainer.callback_metrics["val/accuracy"])
    print(f"validation accuracy {accuracy:.1%}; {before:,} parameters became {after:,}")
    print(f"why: {trainer.log_dir}/decisions.jsonl")


if __name__ == "__main__":
    main()
