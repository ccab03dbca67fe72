"""The toy run that every callback goes through; also a script, for the process that is killed and the two ranks."""

from __future__ import annotations

import argparse
import json
import os
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from adaptrain import _lightning
from adaptrain.callbacks.base import decision_log
from adaptrain.nlp.loader import ResumableLoader, ShuffledSampler
from tests.contract.settings import SETTINGS
from tests.toys import TextModule, quiet_trainer, text_samples, tiny_bert, weights

EPOCHS = 3
STEPS = 18


class KillAt(pl.Callback):
    """SIGKILL, with no chance to clean up, after `step` optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def loader(trainer: Any, *, world_size: int = 1) -> Any:
    """48 samples in 6 batches for each rank, in an order that a checkpoint remembers."""
    samples: Any = text_samples(48 * world_size)
    sampler = ShuffledSampler(samples, seed=0, world_size=world_size, rank=int(os.environ.get("RANK", 0)))
    trained = partial(_lightning.batches_trained, trainer)
    return ResumableLoader(samples, sampler=sampler, batch_size=8, trained=trained)


def fit(
    folder: Path,
    callbacks: list[Any],
    *,
    kill_at: int | None = None,
    resume: bool = False,
    namespace: Any = pl,
    module: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains the toy and returns its final weights, losses and decisions."""
    torch.manual_seed(3)
    module = module if module is not None else TextModule(tiny_bert(dropout=0.0))
    extra: list[Any] = [] if kill_at is None else [KillAt(kill_at)]
    if namespace is pl:
        extra.append(
            ModelCheckpoint(dirpath=folder / "checkpoints", save_top_k=0, save_last=True, every_n_train_steps=4)
        )
        settings["enable_checkpointing"] = True
    trainer = quiet_trainer(folder, namespace=namespace, callbacks=[*callbacks, *extra], max_epochs=EPOCHS, **settings)
    data = loader(trainer, world_size=settings.get("devices", 1))
    trainer.fit(module, data, ckpt_path=str(folder / "checkpoints" / "last.ckpt") if resume else None)
    return {
        "weights": weights(module).tolist(),
        "losses": module.losses,
        "decisions": [json.loads(decision.to_json()) for decision in decision_log(trainer)],
        "step": trainer.global_step,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["kill", "ddp"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.mode == "kill":
        fit(args.folder, [SETTINGS[args.name].build()], kill_at=11)
        raise SystemExit("was not killed")
    rank = int(os.environ["RANK"])
    results = {}
    for name, setting in SETTINGS.items():
        callbacks = [setting.build()]
        results[name] = fit(args.folder / name, callbacks, devices=2, strategy="ddp", accelerator="cpu")
    (args.folder / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
