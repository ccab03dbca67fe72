"""Part errors of the memory benchmark: out-of-memory errors at random places; what is lost, repeated or changed."""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from memory_tasks import Task, fit

import adaptrain

PLACES = ("transfer", "forward", "backward", "optimizer")


class Faults:
    """Raises errors at random, and counts the samples and tokens whose gradients were kept."""

    def __init__(self, share: float, *, seed: int) -> None:
        self.share, self.random = share, random.Random(seed)
        self.raised: dict[str, int] = dict.fromkeys(PLACES, 0)
        self.seen: dict[int, list[int]] = {}

    def maybe(self, place: str, batch_idx: int | None = None) -> None:
        if self.random.random() < self.share:
            self.raised[place] += 1
            if batch_idx is not None:
                self.seen[batch_idx] = [0, 0]  # the attempt is taken back
            raise torch.OutOfMemoryError(f"CUDA out of memory (injected in {place}).")


def faulty(module: Any, faults: Faults) -> Any:
    """Returns the module, with errors in its steps, in fp64 so that rounding does not hide a difference."""
    kind = type(module)

    class Faulty(kind):
        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            if not self._retries:
                self._retries = True  # the second try must succeed
                faults.maybe("transfer")
            self._retries = False
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            samples = len(batch["input_ids"])
            if samples > 1:
                faults.maybe("forward", batch_idx)
            loss = super().training_step(batch, batch_idx)
            if samples > 1:
                loss.register_hook(lambda gradient: faults.maybe("backward", batch_idx))
            counts = faults.seen.setdefault(batch_idx, [0, 0])
            counts[0] += samples
            counts[1] += int(batch["attention_mask"].sum())
            return loss

        def configure_optimizers(self) -> Any:
            found = super().configure_optimizers()
            optimizer = found["optimizer"]
            collect = optimizer._init_group  # after the closure, before the first change

            def collect_or_fail(group: Any, *args: Any) -> Any:
                if group is optimizer.param_groups[0]:
                    self._is_second = not self._is_second
                    if self._is_second:
                        faults.maybe("optimizer")
                        self._is_second = False
                return collect(group, *args)

            optimizer._init_group = collect_or_fail
            return found

    module.__class__ = Faulty
    module._retries = module._is_second = False
    return module.double()


def measure(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """5. Errors injected and survived, samples lost or repeated, and the weights beside an undisturbed run's."""
    steps, batch_size, rows = 12, 16, []
    for seed in range(args.repeats):
        weights: dict[str, torch.Tensor] = {}
        seen: dict[str, dict[int, list[int]]] = {}
        for name, share in (("plain", 0.0), ("ours, no errors", 0.0), ("ours, errors", 0.15)):
            faults = Faults(share, seed=seed)
            module = faulty(task.module(dropout=False), faults)
            before = _flat(module)
            callbacks = [] if name == "plain" else [adaptrain.BatchSizeController(micro_batch_size=12)]
            trainer = fit(module, task.loader(batch_size, seed=seed), *callbacks, steps=steps)
            weights[name] = _flat(module)
            seen[name] = {index: counts for index, counts in faults.seen.items() if index < steps}
            row = {"part": "errors", "task": task.name, "arm": name, "steps": trainer.global_step, **faults.raised}
            row["samples_lost_or_repeated"] = sum(
                abs(seen[name][index][0] - counts[0]) for index, counts in seen["plain"].items()
            )
            row["tokens_lost_or_repeated"] = sum(
                abs(seen[name][index][1] - counts[1]) for index, counts in seen["plain"].items()
            )
            change = weights[name] - weights["plain"]
            # As a share of what training changed.
            row["weight_difference"] = float(change.norm() / (weights["plain"] - before).norm())
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items() if key != "part"), flush=True)
    return rows


def _flat(module: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
