"""Two ranks share an epoch, and a run killed in the middle of it goes on with exactly the rest on each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
import pytorch_lightning as pl
from adaptrain.nlp.datamodules import TextDataModule
from adaptrain.nlp.modules import TextClassifier

train_file, val_file, root, stop_at, resume = sys.argv[1:]

class Record(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rows = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
        with open(f"{root}/rank{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(rows) + "\\n")
        if trainer.global_step == int(stop_at):
            trainer.save_checkpoint(f"{root}/at.ckpt")
            trainer.strategy.barrier()
            os._exit(9)  # as a kill would

if __name__ == "__main__":
    data = TextDataModule(train_file=train_file, val_file=val_file, vocab_size=280, max_length=32, batch_size=4)
    data.setup("fit")
    pl.seed_everything(0, verbose=False)
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = TextClassifier(data=data, dropout=0.0, **shape)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Record()], default_root_dir=root,
    )
    trainer.fit(model, datamodule=data, ckpt_path=resume or None)
"""


def run(folder: Path, files: dict[str, str], *, stop_at: int = 0, resume: str = "") -> list[list[list[int]]]:
    """The batches of each of the two ranks."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    arguments = [files["train_file"], files["val_file"], str(folder), str(stop_at), resume]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), *arguments], env=environment, check=not stop_at, timeout=280)
    return [[json.loads(line) for line in (folder / f"rank{r}.jsonl").read_text().splitlines()] for r in range(2)]


def test_two_ranks_share_the_samples_and_resume_in_the_middle_of_an_epoch(
    tmp_path: Path, reviews: dict[str, str]
) -> None:
    whole = run(tmp_path / "whole", reviews)
    first_epoch = [{str(row) for batch in rank[:7] for row in batch} for rank in whole]
    assert [len(rank) for rank in whole] == [14, 14]
    assert len(first_epoch[0] | first_epoch[1]) == 50
    assert len(first_epoch[0] & first_epoch[1]) == 0
    begun = run(tmp_path / "begun", reviews, stop_at=3)
    rest = run(tmp_path / "rest", reviews, resume=str(tmp_path / "begun" / "at.ckpt"))
    assert [a + b for a, b in zip(begun, rest, strict=True)] == whole
