"""Part peers of the memory benchmark: size finders under a real address-space limit, and a long batch late in training.

Every arm is a process of its own that may map only so much more memory than it has once model and data are loaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from accelerate.utils import find_executable_batch_size
from memory_tasks import Task, fit
from pytorch_lightning.callbacks import BatchSizeFinder
from quiet import be_quiet

import adaptrain
from adaptrain.callbacks.base import decision_log
from adaptrain.resources.peak import proc_status_bytes

ARMS = ("Lightning BatchSizeFinder", "accelerate find_executable_batch_size", "ours")
LONG = 256  # tokens of the samples in the late batch
AFTER = 5  # steps after it
LOGICAL = 64  # the controller's loader; the others choose their batch size


class StartsAgainError(Exception):
    """A peer begins anew after the long batch, as it would at each smaller size: what that throws away is known."""


class Watch(pl.Callback):
    """Notes when each optimizer step began, with its samples, in the last attempt at training.

    Args:
        steps: Steps whose loss is enough to know: an attempt after that many is not watched.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.starts: list[float] = []
        self.samples: list[int] = []
        self.attempts: list[int] = []  # steps that earlier attempts had done

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.starts:
            self.attempts.append(len(self.starts) - 1)
        if sum(self.attempts) >= self.steps:
            raise StartsAgainError(f"begins anew with a smaller batch after {sum(self.attempts)} steps (stopped here)")
        self.starts, self.samples = [], []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(time.perf_counter())
        self.samples.append(len(batch["input_ids"]))


def lengthens(module: Any, after: int) -> Any:
    """Makes the batch after some steps one of long texts."""
    kind = type(module)

    class Lengthens(kind):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if self.trainer.global_step != after or not self.trainer.training:
                return batch
            times = -(-LONG // batch["input_ids"].shape[1])
            wide = {name: batch[name].repeat(1, times)[:, :LONG] for name in ("input_ids", "attention_mask")}
            return {**batch, **wide}

    module.__class__ = Lengthens
    return module


class Sized(pl.LightningDataModule):
    """Has the attribute that Lightning's finder changes."""

    def __init__(self, task: Task, batch_size: int) -> None:
        super().__init__()
        self.task, self.batch_size = task, batch_size

    def train_dataloader(self) -> Any:
        return self.task.loader(self.batch_size, seed=0)

    val_dataloader = train_dataloader  # asked for where a module can validate; no batch of it is drawn


def child(arm: str, task: Task, room_mib: int, steps: int) -> dict[str, Any]:
    """Runs one arm under the limit and returns what came of it."""
    import resource

    task.loader(2, seed=0)  # data loaded and tokenized before the limit
    watch, total, note = Watch(steps), steps + AFTER, ""

    # oneDNN reports a failed allocation as "could not create a primitive", which no size finder knows: without it they
    # get the error they wait for.
    torch.backends.mkldnn.set_flags(False)
    first = lengthens(task.module(), steps)
    fit(task.module(), task.loader(2, seed=0), steps=1)  # threads and libraries are mapped
    limit = (proc_status_bytes("VmSize") or 0) + room_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    began = time.perf_counter()
    error = ""
    try:
        if arm == ARMS[0]:
            finder = BatchSizeFinder(mode="binsearch", init_val=2, max_trials=12)
            fit(first, Sized(task, 2), watch, finder, steps=total, limit_val_batches=0)
        elif arm == ARMS[1]:

            @find_executable_batch_size(starting_batch_size=128)
            def train(batch_size: int) -> None:
                fit(copy.deepcopy(first), task.loader(batch_size, seed=0), watch, steps=total)

            train()  # pyright: ignore[reportCallIssue]
        else:
            controller = adaptrain.BatchSizeController()
            trainer = fit(first, task.loader(LOGICAL, seed=0), watch, controller, steps=total)
            decisions = list(decision_log(trainer))
            caught = sum("ran out" in decision.reason for decision in decisions)
            note = f"micro-batches of {controller.state_dict()['policy']['size']}; {caught} errors caught"
    except Exception as failure:
        error = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:90]}"
    done = max(0, len(watch.starts) - 1)
    settled = range(min(30, done // 2), min(done, steps))
    taken = watch.starts[settled.stop] - watch.starts[settled.start] if settled else 0.0
    return {
        "batch_size": watch.samples[-1] if watch.samples else None,
        "find_s": watch.starts[0] - began if watch.starts else None,
        "samples_per_s": sum(watch.samples[i] for i in settled) / taken if taken else None,
        "steps_done": done + (not error),
        "steps_asked": total,
        "steps_thrown_away": sum(watch.attempts),
        "ended": error or "finished",
        "note": note,
    }


def measure(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """3. The size that each finds, how fast it then is, and what a long batch after many steps does to it."""
    rows = []
    if task.model is None:  # its sequences are all of one length: there is no longer one to come
        return rows
    for arm in ARMS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            call = {"arm": arm, "model": task.model, "train_file": str(task.train_file), "threads": args.threads}
            call |= {"room_mib": args.room_mib, "steps": args.peer_steps, "out": str(out)}
            done = subprocess.run([sys.executable, __file__, json.dumps(call)], capture_output=True, text=True)
            result = json.loads(out.read_text()) if out.exists() else {"ended": f"died ({done.returncode})"}
            if not out.exists():
                result["note"] = done.stderr.strip()[-300:]
        rows.append({"part": "peers", "task": task.name, "arm": arm, "room_mib": args.room_mib, **result})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items() if key != "part"), flush=True)
    return rows


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    be_quiet(request["threads"])
    wanted = Task(request["model"], Path(request["train_file"]))
    found = child(request["arm"], wanted, request["room_mib"], request["steps"])
    Path(request["out"]).write_text(json.dumps(found))
