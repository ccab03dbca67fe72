"""One run, many models: members, cascade, lower precision, soups, frozen layers and adapters, measured on MiniLM.

Parts, each with each seed in a process of its own, appended to the JSON file when done and left out when run again:

    family    one progressive run with FamilyCheckpoint: its members; the same sizes each pruned alone in an equal share
              of the family's wall time; a cascade at half the cost; members in lower precision
    cascade   such a run alone, and a cascade at half the cost
    elastic   another such run, and networks of these sizes inside of one (ElasticTraining), in the same wall time
    soup      three fine-tunings from one initialisation, and their greedy and uniform soup
    freezing  one fine-tuning plain, in three quarters of the steps, and with LayerFreezing by schedule, by signal, in
              turns and unfreezing; each in a process of its own, for its time
    aware     one fine-tuning rounded to 8 and to 4 bits after it, and with its last fifth quantization-aware
    adapters  one fine-tuning of all weights, and of adapters within 2% of them by LowRankAdapters, with equal ranks
              and by gradient, at ten times the rate; each in a process of its own, for its memory

Latencies are fractions of the dense model's, measured in turns. Choices are made on dev.tsv, results are of test.tsv.

    pip install 'adaptrain[bench]'
    python scripts/benchmark_family.py --model MODEL_FOLDER --data DATA_FOLDER --seeds 0 1 2
    python scripts/benchmark_family.py ... --parts soup --epochs 1 --limit 320     # a quick look
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import aligned, load_results, run_in_process, save_results

PARTS = ("family", "cascade", "elastic", "soup", "freezing", "aware", "adapters")
# Of parts whose memory or wall time counts, a process each: a later arm would find kernels that the first had to build.
ARMS: dict[str, tuple[str, ...]] = {
    "freezing": (
        "no layer frozen",
        "fewer steps",
        "freezing by schedule",
        "freezing by signal",
        "freezing in turns",
        "unfreezing",
    ),
    "adapters": ("adapters, uniform", "adapters by gradient", "all weights"),
}
COLUMNS = ("part", "arm", "runs", "dev %", "test %", "latency", "size", "wall s", "peak GiB", "trains M", "notes")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained BERT encoder, such as MiniLM")
    parser.add_argument("--data", required=True, help="folder with train.tsv, dev.tsv and test.tsv")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    every = sorted({arm for arms in ARMS.values() for arm in arms})
    parser.add_argument("--arms", nargs="+", choices=every, default=every, help="of freezing and adapters (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--epochs", type=int, default=3, help="(3)")
    parser.add_argument("--limit", type=int, help="samples of each split (all)")
    parser.add_argument("--batch-size", type=int, default=32, help="(32)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak of the schedule (1e-4)")
    parser.add_argument("--schedule", default="linear", help="of the rate: linear, wsd, cosine, constant (linear)")
    parser.add_argument("--recovery-steps", type=int, default=60, help="of each member but the best (60)")
    parser.add_argument("--untaught", action="store_true", help="members recover without a teacher")
    parser.add_argument(
        "--smallest", type=float, default=0.28, help="latency that the family ends at, as a fraction (0.28)"
    )
    parser.add_argument("--adapters", type=float, default=0.02, help="share of the parameters that they train (0.02)")
    parser.add_argument("--threads", type=int, default=2, help="(2)")
    parser.add_argument("--precision", default="32-true", help="of training, as Lightning names it (32-true)")
    parser.add_argument("--micro-batch-size", type=int, help="samples at once, sorted by length (the whole batch)")
    parser.add_argument("--json", type=Path, default=Path("benchmark_family.json"), help="(%(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("benchmark_family.png"), help="(%(default)s)")
    args = parser.parse_args(arguments)

    settings = {
        name: getattr(args, name)
        for name in ("epochs", "limit", "batch_size", "lr", "threads", "precision", "micro_batch_size", "schedule")
    }
    recovery = {"recovery_steps": args.recovery_steps, "recovery_teacher": None if args.untaught else "best"}
    family = {"recovery": recovery, "smallest": args.smallest, "adapters": args.adapters}
    rows = load_results(args.json, settings | family)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # heard by the processes started below
    for seed in args.seeds:
        for part in args.parts:
            for arm in ARMS.get(part, (None,)):
                if arm not in (None, *args.arms):
                    continue
                done = {(row["part"], row["seed"], row["arm"] if arm else None) for row in rows}
                if (part, seed, arm) in done:
                    continue
                print(f"{arm or part}, seed {seed} ...", flush=True)
                job = {"seed": seed, "model": args.model, "data": args.data, **settings}
                what = f"{arm or part} with seed {seed}"
                rows += run_in_process(_run, what=what, part=part, arm=arm, job=job, **family)
                save_results(args.json, settings | family, rows)
    print("\n" + table(rows))
    plot(rows, args.plot)
    print(f"\n{args.json} and {args.plot}")


def _run(part: str, arm: str | None, job: dict[str, Any], **family: Any) -> list[dict[str, Any]]:
    from family_arms import run
    from pruning_arms import Job

    return run(part, arm, Job(arm="dense", **job), **family)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the results as text, one line an arm: means of accuracies, medians of costs, over the seeds."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for part, arm in dict.fromkeys((row["part"], row["arm"]) for row in rows):
        runs = [row for row in rows if (row["part"], row["arm"]) == (part, arm)]

        def number(name: str, how: Any, form: str, factor: float = 1, runs: list[dict[str, Any]] = runs) -> str:
            values = [factor * row[name] for row in runs if row.get(name) is not None]
            return f"{how(values):{form}}" if values else "-"

        lines.append(
            (
                *(part, arm, str(len(runs))),
                number("dev", statistics.mean, ".1f", 100),
                number("test", statistics.mean, ".1f", 100),
                number("latency", statistics.median, ".3f"),
                number("size", statistics.median, ".3f"),
                number("wall_s", statistics.median, ".0f"),
                number("peak_gib", statistics.median, ".2f"),
                number("trainable", statistics.median, ".2f", 1e-6),
                _notes(runs),
            )
        )
    return "\n".join(aligned(lines, right=False))


def _notes(runs: list[dict[str, Any]]) -> str:
    notes = []
    for row in runs:
        if "escalated" in row:
            alone = ", ".join(f"{name} {test:.1%} at {cost:.2f}" for name, (test, cost) in row["alone"].items())
            notes.append(f"{row['escalated']:.1%} go from {row['small']} to {row['large']}; alone: {alone}")
        elif "note" in row:
            notes.append(row["note"])
    return "; ".join(notes)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws test accuracy over latency for all that answers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    kinds = {
        "members": lambda row: row["arm"].startswith("member "),
        "pruned alone, same time": lambda row: row["arm"] == "pruned alone",
        "elastic, same time": lambda row: row["arm"].startswith("elastic"),
        "cascade": lambda row: row["arm"] == "cascade" and "test" in row,
        "int8": lambda row: row["arm"].startswith("int8_dynamic"),
        "int4": lambda row: row["arm"].startswith("int4_weight"),
        "bfloat16": lambda row: row["arm"].startswith("bf16"),
        "dense, fine-tuned": lambda row: row["arm"] in ("fine-tuned", "no layer frozen", "all weights"),
        "soups": lambda row: "soup" in row["arm"],
        "frozen layers": lambda row: "freezing" in row["arm"],
        "adapters": lambda row: row["arm"].startswith("adapters"),
    }
    for marker, (name, belongs) in zip("oshD^vP*X<>", kinds.items(), strict=True):
        chosen = [row for row in rows if belongs(row)]
        if not chosen:
            continue
        points = sorted((row.get("latency", 1.0), 100 * row["test"]) for row in chosen)
        style = (
            "-" if name in ("members", "pruned alone, same time") and len({row["seed"] for row in rows}) == 1 else ""
        )
        axes.plot(*zip(*points, strict=True), marker=marker, linestyle=style or "none", label=name, alpha=0.8)
    axes.set_xscale("log")
    slowest = max(1.0, *(row.get("latency", 1.0) for row in rows))
    ticks = [tick for tick in (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0, 10.0) if tick <= slowest]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("measured latency, as a fraction of the dense model's")
    axes.set_ylabel("test accuracy in %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
