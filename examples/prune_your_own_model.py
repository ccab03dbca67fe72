"""A transformer of your own, from torch's own layers, pruned while it trains.

Nothing here comes from a model library: a byte classifier around `nn.TransformerEncoder`. Pruning learns where its
heads and feed-forward neurons are from one declaration (`FAMILY`). It tells which of three standard-library packages a
few lines of source come from. Run it with `python examples/prune_your_own_model.py`; under a minute on two CPU cores.
"""

import argparse
import sysconfig
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import adaptrain
from adaptrain.pruning.families import Attention, Family, FeedForward, register_family

PACKAGES = ("asyncio", "email", "tkinter")
LENGTH, WIDTH, LAYERS = 64, 64, 3


class ByteClassifier(nn.Module):
    """Embeds bytes and their positions, encodes them, and classifies the mean over all that are not padding (0)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(257, WIDTH, padding_idx=0), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=256, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(PACKAGES))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        padding = ids == 0
        hidden = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        hidden = self.encoder(hidden, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)
        return self.head(hidden.sum(1) / (~padding).sum(1, keepdim=True))


FAMILY = Family(
    name="byte-classifier",
    matches=lambda module: isinstance(module, ByteClassifier),
    backbone=lambda model: model,
    layers="encoder.layers",  # all paths below start at one of these
    attention=Attention(
        module="self_attn",
        query="self_attn.in_proj",  # query, key and value are fused into one matrix, in this order: in_proj_weight
        key="self_attn.in_proj",
        value="self_attn.in_proj",
        output="self_attn.out_proj",
        head_size="head_dim",
    ),
    ffn=FeedForward(inputs=("linear1",), output="linear2"),
    dense_twin=lambda model: ByteClassifier(),
    example_inputs=lambda model, batch, sequence: {"ids": torch.ones(batch, sequence, dtype=torch.long)},
)


class Module(pl.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ByteClassifier()
        self.accuracy = MulticlassAccuracy(num_classes=len(PACKAGES), average="micro")

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        ids, labels = batch
        return nn.functional.cross_entropy(self.model(ids), labels)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        ids, labels = batch
        self.accuracy(self.model(ids), labels)
        self.log("val/accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def snippets(remainder: int) -> TensorDataset:
    """Pieces of `LENGTH` bytes from every other file of each package, each byte plus one, padded with 0."""
    rows, labels = [], []
    for label, package in enumerate(PACKAGES):
        for path in sorted(Path(sysconfig.get_paths()["stdlib"], package).glob("*.py"))[remainder::2]:
            data = path.read_bytes()
            for start in range(0, len(data) - LENGTH // 2, LENGTH):
                piece = data[start : start + LENGTH]
                rows.append([byte + 1 for byte in piece] + [0] * (LENGTH - len(piece)))
                labels.append(label)
    return TensorDataset(torch.tensor(rows), torch.tensor(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="training epochs (default: 5)")
    parser.add_argument("--limit-batches", type=int, default=None, help="batches an epoch, for a quick look")
    parser.add_argument("--folder", default="runs/own_model", help="where the run goes (default: runs/own_model)")
    args = parser.parse_args()

    pl.seed_everything(0)
    register_family(FAMILY)
    pruning = adaptrain.ProgressivePruning(
        target={"params": 0.6, "flops": 0.5}, schedule={"begin": 0.3, "end": 0.7, "events": 4}
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=args.epochs,
        limit_train_batches=args.limit_batches,
        limit_val_batches=args.limit_batches,
        default_root_dir=args.folder,
        callbacks=[pruning],
    )
    train, val = DataLoader(snippets(0), batch_size=64, shuffle=True), DataLoader(snippets(1), batch_size=64)
    trainer.fit(Module(), train, val)

    report = pruning.report()
    dense, final = report["dense"], report["final"]
    for name, unit in (("params", "parameters"), ("flops", "FLOPs a batch"), ("latency_ms", "ms a batch")):
        print(f"{unit:14} {dense[name]:>12,.4g} dense {final[name]:>12,.4g} pruned ({final[name] / dense[name]:.0%})")
    accuracies = dense["metrics"].get("val/accuracy", float("nan")), float(trainer.callback_metrics["val/accuracy"])
    print(f"{'accuracy':14} {accuracies[0]:>12.1%} dense, before the first event {accuracies[1]:>12.1%} pruned")


if __name__ == "__main__":
    main()
