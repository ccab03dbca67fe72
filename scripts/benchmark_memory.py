"""What BatchSizeController gains and costs, beside plain Lightning, length grouping, fixed sizes and size finders.

    python scripts/benchmark_memory.py --model MINILM_FOLDER --data SST2_FOLDER --json memory.json

The folder of data holds `train.tsv`, a `sentence<TAB>label` a line. Without the two only the language model on the
embedded corpus is trained. Needs `pip install 'adaptrain[nlp,bench]'`. Trainings that are compared take turns step by
step in one process, on the same batches; ratios are of total time, one per repeat.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import memory_faults
import memory_peers
import torch
from lockstep import Turn, lockstep, spread
from memory_tasks import Task, fit
from quiet import be_quiet

import adaptrain
from adaptrain.execution.oom import release_memory
from adaptrain.resources.host import PeakMemory, process_memory_bytes

PARTS = ("speed", "fixed", "overhead", "errors", "peers")
WARMUP = 2


def settle(task: Task, batch_size: int, *, seed: int, **options: Any) -> tuple[dict[str, Any], int, float]:
    """Lets the controller search, and returns its state, the steps and the seconds that took."""
    controller = adaptrain.BatchSizeController(**options)
    watch = _Search(controller)
    fit(task.module(), task.loader(batch_size, seed=seed + 1000), controller, watch, steps=200)
    return controller.state_dict(), watch.steps, watch.seconds


class _Search(Turn):
    """Ends training once the micro-batch size has settled."""

    def __init__(self, controller: Any) -> None:
        self.controller, self.steps, self.seconds = controller, 0, 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps = trainer.global_step
        if not self.steps:
            self._began = time.perf_counter()
        self.seconds = time.perf_counter() - self._began
        if self.steps and not self.controller.state_dict()["policy"]["searching"]:
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.min_steps = 0


def ours(state: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    """Returns a controller, which goes on from a state."""
    controller = adaptrain.BatchSizeController(**options)
    if state is not None:
        controller.load_state_dict(state)
    return [controller]


def race(
    task: Task, batch_size: int, arms: dict[str, Callable[[], list[Any]]], *, steps: int, seed: int, **loader: Any
) -> dict[str, list[float]]:
    """Trains the arms in turns on the same batches (`grouped` makes its own) and returns the seconds of each step."""

    def run(name: str, turn: Turn) -> None:
        data = task.loader(batch_size, seed=seed, grouped=name == "group by length", **loader)
        fit(task.module(), data, turn, *arms[name](), steps=WARMUP + steps + 1)

    times = lockstep({name: partial(run, name) for name in arms}, steps=steps, seed=seed, warmup=WARMUP)
    gc.collect()
    return times


def measure_speed(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """1. Samples per second at several logical batch sizes, against the same loop without the controller."""
    rows = []
    for batch_size in args.batch_sizes:
        steps = max(6, args.samples // batch_size)
        ratios: dict[str, list[float]] = {}
        rates: dict[str, list[float]] = {}
        state, searched, seconds = settle(task, batch_size, seed=0)
        found = {"size": state["policy"]["size"], "steps": searched, "seconds": seconds}
        for repeat in range(args.repeats):
            arms: dict[str, Callable[[], list[Any]]] = {
                "plain": list,
                "group by length": list,
                "ours, samples": partial(ours, micro_batch_size=state["policy"]["size"], split_by="samples"),
                "ours, tokens": partial(ours, state),
            }
            times = race(task, batch_size, arms, steps=steps, seed=repeat)
            for name, taken in times.items():
                rates.setdefault(name, []).append(batch_size * steps / sum(taken))
                ratios.setdefault(name, []).append(sum(times["plain"]) / sum(taken))
            seen = ", ".join(f"{name} {values[-1]:.3f}" for name, values in ratios.items())
            print(f"  batch size {batch_size}, repeat {repeat + 1} of {args.repeats}: {seen}", flush=True)
        for name in ratios:
            row = {"part": "speed", "task": task.name, "batch_size": batch_size, "arm": name}
            row |= {"samples_per_s": statistics.median(rates[name]), "ratio": spread(ratios[name])}
            rows.append(row | ({"search": found} if name == "ours, tokens" else {}))
            show(row)
    return rows


def measure_fixed(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """2. Against every fixed micro-batch size under the same memory cap, the best of them found afterwards."""
    batch_size = args.fixed_batch_size
    sizes = [size for size in (4, 8, 12, 16, 24, 32, 64, 128) if size <= batch_size]
    peaks = {size: _added_gib(task, batch_size, size) for size in sizes}
    cap = (peaks[sizes[-1]] + peaks[sizes[len(sizes) // 2]]) / 2  # about half of the sizes break it
    allowed = [size for size in sizes if peaks[size] <= cap]
    rows = []
    for limit, candidates in ((None, sizes), (cap, allowed)):
        ratios, best = [], []
        release_memory()
        allowance = None if limit is None else _used_gib() + limit
        state, _, _ = settle(task, batch_size, seed=0, memory_limit_gib=allowance, memory_fraction=1.0)
        for repeat in range(args.repeats):
            arms: dict[str, Callable[[], list[Any]]] = {
                str(size): partial(ours, micro_batch_size=size) for size in candidates
            }
            arms["auto"] = partial(ours, state)
            times = race(task, batch_size, arms, steps=max(6, args.samples // batch_size), seed=repeat)
            total = {name: sum(taken) for name, taken in times.items()}
            own = total.pop("auto")
            best.append(int(min(total, key=total.__getitem__)))
            ratios.append(min(total.values()) / own)
        row = {"part": "fixed", "task": task.name, "batch_size": batch_size, "cap_gib": limit}
        row |= {"auto": state["policy"]["size"], "best_fixed": best, "of": candidates, "ratio": spread(ratios)}
        rows.append(row)
        show(row)
    return rows


def _used_gib() -> float:
    return (torch.cuda.memory_allocated() if torch.cuda.is_available() else process_memory_bytes()) / 2**30


def _added_gib(task: Task, batch_size: int, size: int) -> float:
    """Returns what a training at this size takes beside what is in use: the processes' heaps differ."""
    release_memory()
    before, cuda = _used_gib(), torch.cuda.is_available()
    with PeakMemory() as peak:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        fit(task.module(), task.loader(batch_size, seed=0), *ours(micro_batch_size=size), steps=4)
        return (torch.cuda.max_memory_allocated() if cuda else peak.read()) / 2**30 - before


def measure_overhead(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """4. What it costs where nothing needs to change: full-length samples, the whole batch at once."""
    rows, batch_size = [], args.overhead_batch_size
    medians: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for repeat in range(args.repeats):
        arms: dict[str, Callable[[], list[Any]]] = {
            "plain": list,
            "ours, whole batch": partial(ours, micro_batch_size=batch_size),
            "plain again": list,
        }
        times = race(task, batch_size, arms, steps=args.overhead_steps, seed=repeat, width=32)
        for name, taken in times.items():
            medians.setdefault(name, []).append(1e3 * statistics.median(taken))
            pairs = [own / base for own, base in zip(taken, times["plain"], strict=True)]
            ratios.setdefault(name, []).append(statistics.median(pairs))
    for name, values in medians.items():
        row = {"part": "overhead", "task": task.name, "batch_size": batch_size, "arm": name}
        row |= {"step_ms": statistics.median(values), "ratio": spread(ratios[name])}
        rows.append(row)
        show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    """Prints one row of the table."""
    cells = []
    for name, value in row.items():
        if name == "ratio":
            value = f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        cells.append(f"{value}" if name in ("part", "task", "arm") else f"{name} {value}")
    print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pretrained encoder (a Hugging Face model)")
    parser.add_argument("--data", type=Path, help="folder with train.tsv, a sentence<TAB>label a line")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    parser.add_argument("--tasks", nargs="+", choices=("encoder", "language_model"), help="which models (both)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 64, 128], help="logical (32 64 128)")
    parser.add_argument("--fixed-batch-size", type=int, default=64, help="logical batch of part fixed (64)")
    parser.add_argument("--overhead-batch-size", type=int, default=16, help="logical batch of part overhead (16)")
    parser.add_argument("--overhead-steps", type=int, default=60, help="timed steps of part overhead (60)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats, each with its own order of samples (3)")
    parser.add_argument("--samples", type=int, default=768, help="samples timed in a repeat of an arm (768)")
    parser.add_argument("--peer-steps", type=int, default=100, help="optimizer steps before the long batch (100)")
    parser.add_argument("--room-mib", type=int, default=800, help="memory of part peers above the loaded model (800)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument(
        "--json", type=Path, help="write the numbers to this file, after every part, beside what it has"
    )
    args = parser.parse_args()
    tasks = [Task()]
    if args.model is not None and args.data is not None:
        if not (args.data / "train.tsv").is_file():
            parser.error(f"there is no train.tsv in {args.data}")
        tasks.insert(0, Task(args.model, args.data / "train.tsv"))
    elif args.model is not None or args.data is not None:
        parser.error("--model and --data go together: the encoder needs sentences to train on")

    be_quiet(args.threads)
    tasks = [task for task in tasks if args.tasks is None or task.name in args.tasks]
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        for task in tasks:
            if part == "errors":
                rows += memory_faults.measure(task, args)
            elif part == "peers":
                rows += memory_peers.measure(task, args)
            else:
                rows += {"speed": measure_speed, "fixed": measure_fixed, "overhead": measure_overhead}[part](task, args)
            if args.json:
                save(args, rows)


def save(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Writes the rows beside those of other parts that the file holds."""
    parts = {(row["part"], row["task"], row.get("batch_size") if row["part"] == "speed" else 0) for row in rows}
    known = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    kept = [r for r in known if (r["part"], r["task"], r.get("batch_size") if r["part"] == "speed" else 0) not in parts]
    setup = {"torch": torch.__version__, "threads": args.threads, "arguments": vars(args)}
    args.json.write_text(json.dumps({"setup": setup, "rows": kept + rows}, indent=2, default=str))


if __name__ == "__main__":
    main()
