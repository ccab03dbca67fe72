"""What ResourceMonitor costs: the same training steps with and without it, in turns in one process.

Prints the median step time of each arm, their ratio with its spread over the pairs, and the CPU time of one sample.

    python scripts/benchmark_monitor.py --pairs 10
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import adaptrain
from adaptrain.resources import ResourceProbe


class Encoder(pl.LightningModule):
    """The quickstart's encoder on random tokens."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=8192,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
        )
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class StepTimes(pl.Callback):
    """Seconds of each step, from the start of one batch to the start of the next: all hooks are inside."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(time.perf_counter())

    @property
    def median_ms(self) -> float:
        steps = [after - before for before, after in zip(self.starts[5:], self.starts[6:], strict=False)]
        return 1e3 * statistics.median(steps)


def run(loader: DataLoader, *, monitored: bool, folder: str) -> float:
    """Returns the median step time of one short training, in milliseconds."""
    times = StepTimes()
    callbacks: list[Any] = [times, adaptrain.ResourceMonitor(interval_s=1.0)] if monitored else [times]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=callbacks,
        logger=pl.loggers.CSVLogger(folder),  # pyright: ignore[reportAttributeAccessIssue]
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    torch.manual_seed(0)
    trainer.fit(Encoder(), loader)
    return times.median_ms


def sample_ms(repeats: int) -> float:
    """Returns the CPU time of one sample, in milliseconds."""
    probe = ResourceProbe()
    taken = []
    for _ in range(repeats):
        before = time.thread_time()
        probe.read()
        taken.append(1e3 * (time.thread_time() - before))
    probe.close()
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of runs (default: 10)")
    parser.add_argument("--steps", type=int, default=60, help="steps in a run (default: 60)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of 64 tokens in a step (default: 8)")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()

    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):  # the one imported last prints for both
        logging.getLogger(name).setLevel(logging.WARNING)
    samples: Any = [
        {"input_ids": torch.randint(5, 8192, (64,)), "labels": torch.tensor(index % 2)}
        for index in range(args.steps * args.batch_size)
    ]
    loader = DataLoader(samples, batch_size=args.batch_size)
    arms: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        run(loader, monitored=True, folder=folder)  # warm-up
        for pair in range(args.pairs):
            for monitored in (False, True) if pair % 2 else (True, False):
                arms[monitored].append(run(loader, monitored=monitored, folder=folder))
    ratios = sorted(on / off for off, on in zip(arms[False], arms[True], strict=True))
    result = {
        "step_ms_without": statistics.median(arms[False]),
        "step_ms_with": statistics.median(arms[True]),
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "sample_cpu_ms": sample_ms(200),
    }
    print(f"step without the monitor  {result['step_ms_without']:.2f} ms")
    print(f"step with the monitor     {result['step_ms_with']:.2f} ms")
    low, high = result["ratio_quartiles"]
    print(f"ratio                     {result['ratio_median']:.4f} (quartiles {low:.4f} to {high:.4f})")
    print(f"CPU time of one sample    {result['sample_cpu_ms']:.3f} ms, once a second")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
