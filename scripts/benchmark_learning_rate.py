"""The learning rate that was typed, right or wrong: where training ends, beside schedules and peers that set the rate.

Every method trains each task at seven rates over 3.5 decades, with the same steps, paired by seed:

    constant, cosine, wsd, linear    the bare schedule, AdamW (--optimizer sgd: with a momentum of 0.9,
                                     without the last two, which are AdamW of their own)
    SCHEDULE+ours                    with LearningRateController
    SCHEDULE+ours-FACTOR             without one of its factors: align, cap, plateau, batch, recover, guard
                                     (-only-FACTOR: no other)
    plateau                          torch's ReduceLROnPlateau on the validation loss, 20 validations
    greedy                           Hugging Face's GreedyLR on the training loss
    finder                           Lightning's learning-rate finder, its 100 steps free of charge, then cosine
    schedulefree                     schedule-free AdamW
    prodigy                          Prodigy with a cosine, as it recommends

Parts: `rates` (the above), `faults` (a batch that is not a number, ten times the rate for 20 steps, four times the
batch, half of the FLOPs pruned, each at half of the run, for cosine at its best rate, and for those of the methods
that are cosine with a controller), `overhead` (seconds of each step of a whole run with and without the controller,
in turns). A diverged run counts as the untrained model. Rates are chosen on validation data, results are of the test
data. Each run is appended to the JSON file, and left out when run again.

    pip install 'adaptrain[bench]'
    python scripts/benchmark_learning_rate.py                                    # the small tasks
    python scripts/benchmark_learning_rate.py --tasks encoder --model MODEL_FOLDER --data DATA_FOLDER
    python scripts/benchmark_learning_rate.py --methods 'cosine*' --seeds 0 1    # some methods
    python scripts/benchmark_learning_rate.py --steps 40 --seeds 0               # a quick look
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from results import aligned, end_with_parent, load_results, save_results

TASKS = ("language_model", "classifier", "encoder", "long_language_model", "wide_classifier")
PARTS = ("rates", "faults", "overhead")
FAULTS = ("nan", "spike", "batch", "prune")
USUAL = (
    *("constant", "cosine", "wsd", "linear", "plateau", "greedy", "finder", "schedulefree", "prodigy"),
    *("constant+ours", "cosine+ours", "wsd+ours", "linear+ours"),
)
KEY = ("task", "method", "rate", "seed", "fault")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    parser.add_argument(
        *("--tasks",), nargs="+", choices=TASKS, default=list(TASKS[:2]), help="(language_model classifier)"
    )
    parser.add_argument("--methods", nargs="+", default=list(USUAL), help="names, or patterns such as 'cosine*' (all)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="of part faults (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="(0 1 2 3 4)")
    parser.add_argument("--rates", nargs="+", type=float, help="in place of the tasks' own seven")
    parser.add_argument("--steps", type=int, help="optimizer steps, in place of the tasks' own numbers")
    parser.add_argument("--batch-size", type=int, help="samples of a step, in place of the tasks' own numbers")
    parser.add_argument("--model", help="folder of a pretrained encoder, for --tasks encoder")
    parser.add_argument("--data", help="folder with train.tsv, dev.tsv and test.tsv, for --tasks encoder")
    parser.add_argument("--precision", default="32-true", help="of training, as Lightning names it (%(default)s)")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each (cores)")
    parser.add_argument("--json", type=Path, default=Path("benchmark_learning_rate.json"), help="(%(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("benchmark_learning_rate.png"), help="(%(default)s)")
    args = parser.parse_args(arguments)
    if "encoder" in args.tasks and not (args.model and args.data):
        parser.error("--tasks encoder needs --model and --data")

    os.environ["OMP_NUM_THREADS"] = "1"  # heard by the processes started below
    from learning_rate_arms import ADAM_ALONE, controller, make_task

    changed = ("steps", "batch_size", "precision", "optimizer")
    settings: dict[str, Any] = {name: getattr(args, name) for name in changed}
    tasks = [make_task(name, model=args.model, data=args.data, **settings) for name in args.tasks]
    methods = _chosen(args.methods)
    if args.optimizer != "adamw":
        if named := [method for method in ADAM_ALONE if method in args.methods]:
            parser.error(f"{named[0]} is an AdamW of its own: leave out it or --optimizer {args.optimizer}.")
        methods = [method for method in methods if method not in ADAM_ALONE]
    try:
        for method in methods:
            controller(method)
    except ValueError as wrong:
        parser.error(str(wrong))
    store = Store(args.json, settings)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        if "rates" in args.parts:
            store.fill(pool, rate_jobs(tasks, methods, args.seeds, args.rates))
        if "faults" in args.parts:
            store.fill(pool, fault_jobs(tasks, methods, args.faults, store.results, args.seeds))
    if "overhead" in args.parts:
        timed = {result["task"] for result in store.results if result["method"].startswith("overhead ")}
        for task in tasks:
            if task.name not in timed:
                store.keep(measure_overhead(task))
    for task in tasks:
        print("\n" + report(task.name, task.has_accuracy, store.results))
    if any(result.get("rate") for result in store.results):
        plot([(task.name, task.has_accuracy) for task in tasks], store.results, args.plot)
        print(f"\n{args.json} and {args.plot}")


def _chosen(patterns: Iterable[str]) -> list[str]:
    """Returns the methods asked for, in order: patterns choose among the usual ones, full names are free."""
    chosen: list[str] = []
    for pattern in patterns:
        chosen += [method for method in USUAL if fnmatch(method, pattern)] or [pattern]
    return list(dict.fromkeys(chosen))


# Runs ------------------------------------------------------------------------------------------------------------


class Store:
    """Results in a JSON file, written as they come."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.results = load_results(path, settings)

    def fill(self, pool: ProcessPoolExecutor, jobs: list[dict[str, Any]]) -> None:
        """Runs what is not there yet."""
        from tqdm import tqdm

        done = {tuple(result.get(name) for name in KEY) for result in self.results}
        left = [job for job in jobs if (job["task"].name, *(job.get(name) for name in KEY[1:])) not in done]
        pending = [pool.submit(_run, job) for job in left]
        failed: list[BaseException] = []
        for future in tqdm(as_completed(pending), total=len(pending), unit="run", mininterval=5):
            if (error := future.exception()) is None:
                self.keep([future.result()])
            else:
                failed.append(error)
        if failed:
            raise SystemExit(
                f"{len(failed)} of {len(pending)} runs failed, the others are kept. The first: {failed[0]!r}"
            )

    def keep(self, results: list[dict[str, Any]]) -> None:
        self.results += results
        save_results(self.path, self.settings, self.results)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from learning_rate_arms import run, untrained

    return untrained(job["task"], job["seed"]) if job["method"] == "untrained" else run(**job)


def rate_jobs(
    tasks: list[Any], methods: list[str], seeds: list[int], rates: list[float] | None
) -> list[dict[str, Any]]:
    """Returns the runs of part `rates`, seed by seed, so that what is done at any time is paired."""
    from learning_rate_arms import SET_THEIR_RATE

    jobs: list[dict[str, Any]] = []
    for seed in seeds:
        for task in tasks:
            jobs.append({"task": task, "method": "untrained", "seed": seed})
            for method in methods:
                typed = [None] if method in SET_THEIR_RATE else rates or task.rates
                jobs += [{"task": task, "method": method, "rate": rate, "seed": seed} for rate in typed]
    return jobs


def fault_jobs(
    tasks: list[Any], methods: list[str], faults: list[str], results: list[dict[str, Any]], seeds: list[int]
) -> list[dict[str, Any]]:
    """Returns the runs of part `faults`: cosine at its best rate, and with the controllers that `methods` ask for."""
    arms = ["cosine", *(method for method in methods if method.startswith("cosine+"))]

    jobs: list[dict[str, Any]] = []
    for task in tasks:
        rate = best_rate(task.name, "cosine", results) or sorted(task.rates)[len(task.rates) // 2]
        for seed in seeds:
            for fault in (None, *faults):
                for method in arms:
                    jobs.append({"task": task, "method": method, "rate": rate, "seed": seed, "fault": fault})
    return jobs


def measure_overhead(task: Any, *, repeats: int = 3) -> list[dict[str, Any]]:
    """Times a whole run with the controller beside the same without it, step by step in turns.

    It is a whole run, since the controller looks at every step while it searches, and at some of them later.
    """
    from learning_rate_arms import fit_endlessly
    from lockstep import lockstep

    rows = []
    for repeat in range(repeats):
        arms = {"plain": "wsd", "ours": "wsd+ours", "plain again": "wsd"}
        fits = {name: partial(fit_endlessly, task, method, task.steps + 4) for name, method in arms.items()}
        times = lockstep(fits, steps=task.steps, seed=repeat)
        for name, taken in times.items():
            ratios = [own / base for own, base in zip(taken, times["plain"], strict=True)]
            row = {"task": task.name, "method": f"overhead {name}", "seed": repeat}
            whole = sum(taken) / sum(times["plain"])
            rows.append(
                row | {"ratio": statistics.median(ratios), "whole": whole, "step_ms": 1e3 * statistics.median(taken)}
            )
    return rows


# What they came to -----------------------------------------------------------------------------------------------


def _score(result: dict[str, Any], split: str, has_accuracy: bool) -> float:
    """Returns what is to be small: the loss in nats, or the error in points."""
    if has_accuracy:
        return 100 * (1 - result[f"{split}_accuracy"])
    return result[f"{split}_loss"]


def best_rate(task: str, method: str, results: list[dict[str, Any]]) -> float | None:
    """Returns the rate with the lowest median validation loss."""
    by_rate: dict[float, list[float]] = {}
    for result in results:
        if result["task"] == task and result["method"] == method and result.get("rate") and not result.get("fault"):
            loss = result["val_loss"]
            by_rate.setdefault(result["rate"], []).append(loss if math.isfinite(loss) else math.inf)
    return min(by_rate, key=lambda rate: statistics.median(by_rate[rate])) if by_rate else None


def scores(task: str, has_accuracy: bool, results: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """Returns {method: {rate: {seed: score}}}; a diverged run has the untrained model's score, or its own if worse."""
    of_task = [result for result in results if result["task"] == task and not result.get("fault")]
    floors = {r["seed"]: _score(r, "test", has_accuracy) for r in of_task if r["method"] == "untrained"}
    found: dict[str, Any] = {}
    for result in of_task:
        if "test_loss" not in result or result["method"] == "untrained":
            continue
        score = _score(result, split, has_accuracy)
        if not math.isfinite(result["test_loss"]):
            score = floors.get(result["seed"], math.inf)
        found.setdefault(result["method"], {}).setdefault(result["rate"], {})[result["seed"]] = score
    return found


def report(task: str, has_accuracy: bool, results: list[dict[str, Any]]) -> str:
    """Returns a task's tables as text."""
    unit = "points of test error" if has_accuracy else "nats of test loss"
    found = scores(task, has_accuracy, results, "test")
    rates = sorted({rate for by_rate in found.values() for rate in by_rate if rate is not None})
    lines = []
    if found:
        medians = {m: {r: statistics.median(s.values()) for r, s in by.items()} for m, by in found.items()}
        best = min(score for by in medians.values() for score in by.values())
        seeds = max(len(by_seed) for by in found.values() for by_seed in by.values())
        lines += [f"{task}: {unit}, medians of up to {seeds} seeds; the best of all is {best:.3f}. Excess over it:"]
        header = ["method", "mean", "by chance", "worst", *(f"{rate:g}" for rate in rates), "at best rate vs bare"]
        rows = [header]
        for method, by_rate in sorted(medians.items(), key=lambda item: _mean_excess(item[1], best)):
            spread = [by_rate.get(rate, by_rate.get(None, math.nan)) - best for rate in rates]
            rows.append(
                [method, f"{_mean_excess(by_rate, best):.3f}", by_chance(found[method])]
                + [f"{max(by_rate.values()) - best:.3f}"]
                + [f"{value:.3f}" for value in spread]
                + [tuned(task, method, found, results)]
            )
        lines += aligned(rows)
    faults = [r for r in results if r["task"] == task and "fault" in r and "test_loss" in r]
    if any(r["fault"] for r in faults):
        lines += ["", f"{task}, faults at half of the run: {unit} more than the undisturbed bare schedule, medians"]
        lines += aligned(_fault_rows(faults, has_accuracy))
    overhead = [r for r in results if r["task"] == task and r["method"].startswith("overhead ")]
    for method in dict.fromkeys(r["method"] for r in overhead):
        ratios = [r["ratio"] for r in overhead if r["method"] == method]
        step = statistics.median(r["step_ms"] for r in overhead if r["method"] == method)
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        whole = statistics.median(r["whole"] for r in overhead if r["method"] == method)
        lines.append(f"{task}, {method}: {spread} of plain in the median step, {whole:.3f} in all, step {step:.1f} ms")
    return "\n".join(lines)


def _mean_excess(by_rate: dict[float | None, float], best: float) -> float:
    return statistics.mean(score - best for score in by_rate.values())


def by_chance(by_rate: dict[float | None, dict[int, float]], *, draws: int = 2000) -> str:
    """Returns the mean excess over its best rate that a method would show if no rate were better than another.

    The least of several medians lies below the others by chance. Scores change places among the rates of a seed, as in
    a permutation test, so that what is left of the excess is that.
    """
    seeds = set.intersection(*(set(by_seed) for by_seed in by_rate.values()))
    if len(by_rate) < 2 or not seeds:
        return ""
    source, rows = random.Random(0), [[by_seed[seed] for by_seed in by_rate.values()] for seed in sorted(seeds)]

    def drawn() -> float:
        medians = [statistics.median(column) for column in zip(*(source.sample(r, len(r)) for r in rows), strict=True)]
        return statistics.mean(medians) - min(medians)

    return f"{statistics.mean(drawn() for _ in range(draws)):.3f}"


def tuned(task: str, method: str, found: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Returns the paired difference to the bare schedule at that one's best rate, with a bootstrap interval of 95%."""
    bare = method.partition("+")[0]
    rate = best_rate(task, bare, results)
    if bare == method or rate is None or rate not in found.get(bare, {}) or rate not in found[method]:
        return ""
    own, base = found[method][rate], found[bare][rate]
    gaps = [own[seed] - base[seed] for seed in own if seed in base]
    if not gaps:
        return ""
    low, high = bootstrap(gaps)
    return f"{statistics.mean(gaps):+.3f} ({low:+.3f} to {high:+.3f})"


def bootstrap(values: Sequence[float], *, draws: int = 10_000) -> tuple[float, float]:
    """Returns the 95% percentile interval of the mean."""
    source = random.Random(0)
    means = sorted(statistics.mean(source.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def _fault_rows(results: list[dict[str, Any]], has_accuracy: bool) -> list[list[str]]:
    rate = {r["rate"] for r in results if r["fault"]}
    clean = {
        r["seed"]: _score(r, "test", has_accuracy)
        for r in results
        if r["method"] == "cosine" and r["fault"] is None and r["rate"] in rate
    }
    methods = list(dict.fromkeys(r["method"] for r in results if r["fault"]))
    rows = [["fault", *methods]]
    for fault in (None, *dict.fromkeys(r["fault"] for r in results if r["fault"])):
        row = ["none" if fault is None else fault]
        for method in methods:
            runs = [r for r in results if (r["method"], r["fault"]) == (method, fault) and r["rate"] in rate]
            runs = [r for r in runs if r["seed"] in clean]
            gaps = [_score(r, "test", has_accuracy) - clean[r["seed"]] for r in runs if math.isfinite(r["test_loss"])]
            lost = len(runs) - len(gaps)
            median = f"{statistics.median(gaps):+.3f}" if gaps else ""
            row.append(f"{median} ({lost} of {len(runs)} lost)" if lost else median)
        rows.append(row)
    return rows


def plot(tasks: list[tuple[str, bool]], results: list[dict[str, Any]], path: Path) -> None:
    """Draws where training ends over the rate that was typed, a panel a task; the band is the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(tasks), figsize=(6.2 * len(tasks), 4.6), layout="constrained", squeeze=False)
    found_by_task = {task: scores(task, has_accuracy, results, "test") for task, has_accuracy in tasks}
    methods = {method for found in found_by_task.values() for method in found if "ours-" not in method}
    colors = {
        method: f"C{index}" if index < 10 else "black"
        for index, method in enumerate(sorted(methods, key=lambda method: ("+ours" not in method, method)))
    }
    lines: dict[str, Any] = {}
    for axes, (task, has_accuracy) in zip(panels[0], tasks, strict=True):
        found = found_by_task[task]
        for method, color in colors.items():
            if method not in found:
                continue
            bold = {"linewidth": 2.4} if "+ours" in method else {"linewidth": 1.1, "linestyle": "--"}
            by_rate = found[method]
            if None in by_rate:
                lines[method] = axes.axhline(statistics.median(by_rate[None].values()), color=color, linestyle=":")
                continue
            rates = sorted(by_rate)
            medians = [statistics.median(by_rate[rate].values()) for rate in rates]
            (lines[method],) = axes.plot(rates, medians, color=color, marker="o", markersize=3, **bold)
            if "+ours" in method:
                low, high = zip(*((min(by_rate[r].values()), max(by_rate[r].values())) for r in rates), strict=True)
                axes.fill_between(rates, low, high, color=color, alpha=0.12)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate that was typed")
        axes.set_ylabel("test error in %" if has_accuracy else "test loss in nats")
        axes.set_title(task.replace("_", " "))
        axes.grid(alpha=0.3)
    shown = [method for method in colors if method in lines]
    figure.legend([lines[method] for method in shown], shown, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
