"""A language model from scratch at half of the FLOPs: pruned while it trains, or small from the start for as long.

Arms, paired by seed (same order of samples), each in a process of its own, appended to the JSON file when done:

    dense    the whole model, for all steps
    pruned   the same steps with ProgressivePruning to --flops of the dense model's FLOPs
    small    a narrower model of the FLOPs that `pruned` ended with, trained for the wall time that `pruned` took,
             on a schedule that ends with it (WallClock)

    pip install 'adaptrain[bench]'
    python scripts/benchmark_pruning_language_model.py --seeds 0 1 2
    python scripts/benchmark_pruning_language_model.py --steps 20 --limit 64     # a quick look
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import aligned, load_results, run_in_process, save_results

COLUMNS = ("arm", "runs", "perplexity", "of each", "FLOPs", "parameters M", "steps", "wall s", "peak GiB")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--steps", type=int, default=400, help="of dense and pruned (400)")
    parser.add_argument("--flops", type=float, default=0.5, help="of the dense model's, at the end (0.5)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of 128 tokens in a step (32)")
    parser.add_argument("--limit", type=int, help="sequences of the validation and the test split (all)")
    parser.add_argument("--schedule", default="wsd", help="of the rate: linear, cosine, wsd, constant (wsd)")
    parser.add_argument("--threads", type=int, default=2, help="(2)")
    parser.add_argument("--json", type=Path, default=Path("benchmark_pruning_language_model.json"))
    args = parser.parse_args(arguments)

    settings = {name: getattr(args, name) for name in ("steps", "flops", "batch_size", "limit", "schedule", "threads")}
    results = load_results(args.json, settings)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # heard by the processes started below
    for seed in args.seeds:
        for arm in ("dense", "pruned", "small"):
            if any((result["arm"], result["seed"]) == (arm, seed) for result in results):
                continue
            print(f"{arm}, seed {seed} ...", flush=True)
            pruned = next((r for r in results if (r["arm"], r["seed"]) == ("pruned", seed)), None)
            job = {"arm": arm, "seed": seed, "like": pruned, **settings}
            results.append(run_in_process(run, what=f"{arm} with seed {seed}", **job))
            save_results(args.json, settings, results)
            print(f"  perplexity {results[-1]['perplexity']:.1f}, {results[-1]['wall_s']:.0f} s", flush=True)
    print("\n" + table(results))
    print(f"\n{args.json}")


def run(
    *,
    arm: str,
    seed: int,
    like: dict[str, Any] | None,
    steps: int,
    flops: float,
    batch_size: int,
    limit: int | None,
    schedule: str,
    threads: int,
) -> dict[str, Any]:
    """Trains one arm and says what came of it; `like` is what `pruned` came to, for `small`."""
    import pytorch_lightning as pl
    from pruning_arms import GIB
    from quiet import be_quiet, quiet_trainer

    import adaptrain
    from adaptrain.nlp.datamodules import CorpusDataModule
    from adaptrain.nlp.modules import CausalLanguageModel
    from adaptrain.pruning import cost
    from adaptrain.resources.peak import PeakMemory

    be_quiet(threads)
    data = CorpusDataModule(
        task="language_model",
        vocab_size=4096,
        max_length=128,
        batch_size=batch_size,
        limit_val=limit,
        limit_test=limit,
        seed=seed,
    )
    data.prepare_data()
    data.setup("fit")

    def build(width: int) -> Any:
        pl.seed_everything(seed, verbose=False)
        return CausalLanguageModel(data=data, hidden_size=width, intermediate_size=3 * width, schedule=schedule)

    def flops_of(module: Any) -> int:
        return cost.count_flops(module.model, cost.example_inputs(module.model, 1, 128))

    module = build(128)
    dense = flops_of(module)
    callbacks: list[Any] = []
    limits: dict[str, Any] = {"max_steps": steps, "max_epochs": -1}
    if arm == "pruned":
        callbacks = [adaptrain.ProgressivePruning(target={"flops": flops})]
    elif arm == "small":
        assert like is not None
        wanted = like["flops"] * dense
        module = min((build(width) for width in range(16, 128, 8)), key=lambda each: abs(flops_of(each) - wanted))
        callbacks, limits = [adaptrain.WallClock(minutes=like["wall_s"] / 60)], {"max_steps": -1, "max_epochs": -1}
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(folder, callbacks=callbacks, gradient_clip_val=1.0, limit_val_batches=0, **limits)
        pl.seed_everything(seed, verbose=False)
        began = time.perf_counter()
        with PeakMemory() as memory:
            trainer.fit(module, data)
            peak = memory.read()
        wall = time.perf_counter() - began
        data.setup("test")
        perplexity = trainer.test(module, data, verbose=False)[0]["test/perplexity"]
    return {
        "arm": arm,
        "seed": seed,
        "perplexity": perplexity,
        "flops": flops_of(module) / dense,
        "params": cost.count_params(module.model),
        "steps": trainer.global_step,
        "wall_s": wall,
        "peak_gib": peak / GIB,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as text, one line an arm: medians over the seeds."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for arm in dict.fromkeys(result["arm"] for result in results):
        runs = [result for result in results if result["arm"] == arm]

        def median(name: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.median(run[name] for run in runs)

        rows.append(
            (
                *(arm, str(len(runs)), f"{median('perplexity'):.1f}"),
                " ".join(f"{run['perplexity']:.1f}" for run in runs),
                f"{median('flops'):.3f}",
                f"{median('params') / 1e6:.3f}",
                f"{median('steps'):.0f}",
                f"{median('wall_s'):.0f}",
                f"{median('peak_gib'):.2f}",
            )
        )
    return "\n".join(aligned(rows))


if __name__ == "__main__":
    main()
