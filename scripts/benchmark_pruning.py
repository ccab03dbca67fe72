"""Pruning while training, beside its peers: accuracy over measured latency on a fine-tuned sentence classifier.

Every arm fine-tunes the same pretrained encoder, paired by seed (same new head, same order of samples). An arm is a
method, with the latency it aims at as a fraction of the dense model's behind an @:

    dense               plain fine-tuning
    ours                ProgressivePruning, to the latency
    ours+distillation   the same, taught by the dense model from the first event on
    ours+teacher        the same, taught from the start by a dense model that was fine-tuned on the same data before;
                        its training is not in the wall time but in the JSON file (`spent_s`)
    ours+tokens         ours, with BatchSizeController(split_by="tokens")
    ours+OPTION         an ablation: layers, early, late, linear, oneshot, magnitude, activation, movement, random,
                        rate, reconstruct
    tp-taylor           Torch-Pruning once after the first epoch, heads and FFN, by gradients; new optimizer afterwards
    tp-magnitude        the same by weights
    lightning           Lightning's ModelPruning: 1 - target of the encoder's weights to zero after the first epoch
    small               not pruned: the first layers of the encoder, narrowed to the latency, tuned from the start

Each (arm, seed) runs in a process of its own, is appended to the JSON file when done, and is left out when run again.
Data are train.tsv, dev.tsv and test.tsv with lines of sentence<TAB>label and no header.

    pip install 'adaptrain[bench]'
    python scripts/benchmark_pruning.py --model MODEL_FOLDER --data DATA_FOLDER --seeds 0 1 2
    python scripts/benchmark_pruning.py ... --arms dense 'ours@*'       # some arms
    python scripts/benchmark_pruning.py ... --limit 320 --epochs 1      # a quick look
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from results import aligned, load_results, run_in_process, save_results

ARMS = (
    "dense",
    *(
        f"{method}@{target}"
        for target in (0.5, 0.28)
        for method in ("ours", "ours+distillation", "tp-taylor", "tp-magnitude", "small")
    ),
    *(f"{method}@{target}" for target in (0.7, 0.15) for method in ("ours", "ours+distillation", "tp-taylor", "small")),
    "lightning@0.5",
    "lightning@0.28",
)
COLUMNS = (
    *("arm", "runs", "dev %", "test %", "vs dense", "latency", "params M", "zeros", "wall s", "peak GiB", "events"),
    *("table s", "scoring s", "cutting s"),  # of the wall time: costs measured, units scored, events carried out
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained BERT encoder, such as MiniLM")
    parser.add_argument("--data", required=True, help="folder with train.tsv, dev.tsv and test.tsv")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), help="arms, or patterns such as 'ours*' (default: all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--epochs", type=int, default=3, help="(default: 3)")
    parser.add_argument("--limit", type=int, help="samples of each split (default: all)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: 32)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak of the schedule (default: 1e-4)")
    parser.add_argument(
        "--schedule", default="wsd", help="of the rate in every arm: linear, wsd, cosine, constant (default: wsd)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of each process (default: 2)")
    parser.add_argument("--precision", default="32-true", help="of training, as Lightning names it (default: 32-true)")
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        help="samples at once, sorted by length, in every arm: the same gradients sooner (default: the whole batch)",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("benchmark_pruning.json"), help="results (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, default=Path("benchmark_pruning.png"), help="(default: %(default)s)")
    args = parser.parse_args(arguments)

    signal.signal(signal.SIGTERM, _terminate)
    settings = {
        "epochs": args.epochs,
        "limit": args.limit,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "schedule": args.schedule,
        "threads": args.threads,
        "precision": args.precision,
        "micro_batch_size": args.micro_batch_size,
    }
    results = load_results(args.json, settings)
    done = {(result["arm"], result["seed"]) for result in results}
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # heard by the processes started below
    for seed in args.seeds:
        for arm in _chosen(args.arms):
            if (arm, seed) in done:
                continue
            print(f"{arm}, seed {seed} ...", flush=True)
            what = f"{arm} with seed {seed}"
            result = run_in_process(_run, what=what, arm=arm, seed=seed, data=args.data, model=args.model, **settings)
            results.append(result)
            save_results(args.json, settings, results)
            print(f"  test {result['test']:.2%}, latency {result['latency']:.3f}, {result['wall_s']:.0f} s", flush=True)
    print("\n" + table(results))
    plot(results, args.plot)
    print(f"\n{args.json} and {args.plot}")


def _terminate(*_: Any) -> None:
    """Leaves in order, so that the process of the arm ends too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _chosen(patterns: Sequence[str]) -> list[str]:
    """Returns the arms asked for, in order: patterns choose among the usual ones, full names are free."""
    chosen: list[str] = []
    for pattern in patterns:
        known = [arm for arm in ARMS if fnmatch(arm, pattern)]
        chosen += known or [pattern]
    return list(dict.fromkeys(chosen))


def _run(**job: Any) -> dict[str, Any]:
    from pruning_arms import Job, run

    asked = Job(**job)
    if (wrong := asked.unknown()) is not None:
        raise SystemExit(wrong)
    return run(asked)


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as text, one line an arm: means over seeds with standard deviations, medians of costs."""
    dense = {result["seed"]: result["test"] for result in results if result["arm"] == "dense"}
    rows: list[tuple[str, ...]] = [COLUMNS]
    for arm in dict.fromkeys(result["arm"] for result in results):
        runs = [result for result in results if result["arm"] == arm]
        gaps = [100 * (r["test"] - dense[r["seed"]]) for r in runs if r["seed"] in dense]

        def median(name: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.median(run[name] for run in runs)

        rows.append(
            (
                arm,
                str(len(runs)),
                _mean([100 * run["dev"] for run in runs]),
                _mean([100 * run["test"] for run in runs]),
                _mean(gaps, sign="+") if gaps else "-",
                f"{median('latency'):.3f}",
                f"{median('params') / 1e6:.2f}",
                f"{median('zeros'):.0%}",
                f"{median('wall_s'):.0f}",
                f"{median('peak_gib'):.2f}",
                f"{median('events'):g}",
                *(_spent(runs, name) for name in ("table", "scoring", "events")),
            )
        )
    return "\n".join(aligned(rows))


def _spent(runs: list[dict[str, Any]], name: str) -> str:
    seconds = [run["spent_s"][name] for run in runs if name in run["spent_s"]]
    return f"{statistics.median(seconds):.1f}" if seconds else "-"


def _mean(values: list[float], *, sign: str = "") -> str:
    spread = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draws test accuracy over measured latency, means over seeds with a standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    methods: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for result in results:
        methods.setdefault(result["arm"].partition("@")[0], {}).setdefault(result["arm"], []).append(result)
    for marker, (method, arms) in zip("soD^vP*X<>" * 2, methods.items(), strict=False):
        points = []
        for runs in arms.values():
            accuracies = [100 * run["test"] for run in runs]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            points.append((statistics.median(run["latency"] for run in runs), statistics.mean(accuracies), spread))
        latency, accuracy, spread = zip(*sorted(points), strict=True)
        if method == "dense":
            axes.axhline(accuracy[0], color="0.7", linewidth=1, zorder=0)
        axes.errorbar(latency, accuracy, yerr=spread, marker=marker, capsize=3, label=method)
    axes.set_xscale("log")
    ticks = [0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("measured latency, as a fraction of the dense model's")
    axes.set_ylabel("test accuracy in %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
