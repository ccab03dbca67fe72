"""The benchmarks' own machinery: trainings that take turns, and a small run of every part that needs no data."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from adaptrain.pruning import cost
from adaptrain.pruning.families import find_family
from tests.processes import run_python
from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, tiny_bert, weights

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_trainings_in_turns_end_as_each_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from lockstep import lockstep

    order: list[tuple[str, int]] = []

    class Noted(TextModule):
        def training_step(self, batch, batch_idx):
            order.append((next(name for name, module in modules.items() if module is self), batch_idx))
            return super().training_step(batch, batch_idx)

    modules = {"slow": Noted(lr=1e-3), "fast": Noted(lr=1e-2)}

    def train(name: str, *callbacks) -> None:
        quiet_trainer(tmp_path, callbacks=list(callbacks)).fit(modules[name], text_loader(text_samples(48)))

    times = lockstep({name: lambda turn, name=name: train(name, turn) for name in modules}, steps=3, warmup=2)
    assert {name: len(taken) for name, taken in times.items()} == {"slow": 3, "fast": 3}
    for round_number in range(5):  # one batch of each in every round
        assert sorted(order[2 * round_number : 2 * round_number + 2]) == [
            ("fast", round_number),
            ("slow", round_number),
        ]
    for name, lr in (("slow", 1e-3), ("fast", 1e-2)):
        alone = TextModule(lr=lr)
        quiet_trainer(tmp_path).fit(alone, text_loader(text_samples(48)))
        torch.testing.assert_close(weights(modules[name]), weights(alone), rtol=0, atol=0)


@pytest.mark.slow
def test_the_memory_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    command = [sys.executable, str(SCRIPTS / "benchmark_memory.py"), "--json", str(out), "--repeats", "1"]
    command += ["--batch-sizes", "8", "--samples", "48", "--fixed-batch-size", "8", "--overhead-steps", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert {row["part"] for row in rows} == {"speed", "fixed", "overhead", "errors"}
    disturbed = [row for row in rows if row.get("arm") == "ours, errors"]
    assert sum(row["forward"] + row["backward"] + row["optimizer"] + row["transfer"] for row in disturbed) > 0
    assert all(row["samples_lost_or_repeated"] == 0 for row in disturbed)


def test_the_memory_benchmark_refuses_half_an_encoder(tmp_path: Path) -> None:
    done = run_python(SCRIPTS / "benchmark_memory.py", "--data", tmp_path, folder=tmp_path)
    assert done.returncode == 2
    assert "--model and --data go together" in done.stderr


@pytest.fixture
def small_encoder(tmp_path: Path) -> tuple[Path, Path]:
    """A BERT folder with its tokenizer, and a folder of labelled sentences."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    model, data = tmp_path / "encoder", tmp_path / "data"
    data.mkdir()
    words = ["good", "fine", "great", "bad", "poor", "dull", "film", "plot", "scene", "actor"]
    for name, count in (("train", 96), ("dev", 32), ("test", 32)):
        lines = [f"{words[i % 6]} {words[6 + i % 4]} {words[6 + i // 4 % 4]}\t{int(i % 6 < 3)}" for i in range(count)]
        (data / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    learned = BertWordPieceTokenizer()
    learned.train([str(data / "train.tsv")], vocab_size=80, min_frequency=1)
    BertTokenizerFast(tokenizer_object=learned._tokenizer).save_pretrained(model)
    config = BertConfig(
        vocab_size=80, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, num_labels=2
    )
    BertForSequenceClassification(config).save_pretrained(model)
    return model, data


@pytest.mark.slow
def test_the_pruning_benchmark_runs_and_goes_on_where_it_stopped(tmp_path: Path, small_encoder) -> None:
    model, data = small_encoder
    out, picture = tmp_path / "pruning.json", tmp_path / "pruning.png"
    command = [sys.executable, str(SCRIPTS / "benchmark_pruning.py"), "--model", str(model), "--data", str(data)]
    command += ["--json", str(out), "--plot", str(picture), "--epochs", "2", "--seeds", "0", "--batch-size", "8"]
    arms = ["dense", "ours@0.7", "ours+tokens+distillation@0.7", "ours+teacher@0.7", "tp-taylor@0.7"]
    arms += ["tp-magnitude@0.7", "lightning@0.5"]
    done = subprocess.run([*command, "--arms", *arms[:1]], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([*command, "--arms", *arms], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dense, seed 0" not in done.stdout  # it was there already
    results = {result["arm"]: result for result in json.loads(out.read_text())["results"]}
    assert list(results) == arms
    assert results["lightning@0.5"]["zeros"] == pytest.approx(0.5, abs=0.05)
    assert results["ours@0.7"]["params"] < results["dense"]["params"]
    assert results["ours+teacher@0.7"]["spent_s"]["teacher"] > 0
    assert picture.stat().st_size > 1000


def test_the_pruning_benchmark_refuses_arms_and_options_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from pruning_arms import Job

    def wrong(arm: str) -> str | None:
        return Job(arm, 0, "", "", 1, None, 8, 1e-4, 1, "32-true", None, "wsd").unknown()

    assert wrong("ours+layers+distillation@0.5") is None
    assert "no arm 'theirs@0.5'" in str(wrong("theirs@0.5"))
    assert "no option 'magic'" in str(wrong("ours+magic@0.5"))
    assert "no option 'layers'" in str(wrong("dense+layers"))


def test_the_pruning_benchmark_s_small_model_keeps_first_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import pruning_arms

    def flops_ratio(dense: Any, other: Any, inputs: Any, *, turns: int) -> float:
        return cost.count_flops(other, inputs) / cost.count_flops(dense, inputs)

    monkeypatch.setattr(pruning_arms, "latency_ratio", flops_ratio)
    model = tiny_bert(layers=4)
    small, note = pruning_arms.truncated(model, 0.5, (4, 16))
    assert note.startswith("first 2 of 4 layers")
    assert len(find_family(small).layers) == small.config.num_hidden_layers == 2
    assert len(find_family(model).layers) == 4
    inputs = cost.example_inputs(model, 4, 16)
    assert 0.4 < flops_ratio(model, small, inputs, turns=1) <= 0.5


@pytest.mark.slow
@pytest.mark.timeout(1200)  # two commands, which have time limits of their own
def test_the_family_benchmark_runs_and_goes_on_where_it_stopped(tmp_path: Path, small_encoder) -> None:
    model, data = small_encoder
    out, picture = tmp_path / "family.json", tmp_path / "family.png"
    command = [sys.executable, str(SCRIPTS / "benchmark_family.py"), "--model", str(model), "--data", str(data)]
    command += ["--json", str(out), "--plot", str(picture), "--epochs", "2", "--seeds", "0", "--batch-size", "8"]
    command += ["--recovery-steps", "4", "--smallest", "0.8", "--adapters", "0.06"]
    done = subprocess.run([*command, "--parts", "soup", "freezing"], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "soup, seed 0" not in done.stdout  # it was there already
    rows = json.loads(out.read_text())["results"]
    arms = {
        part: [row["arm"] for row in rows if row["part"] == part]
        for part in ("soup", "freezing", "family", "cascade", "elastic", "adapters")
    }
    # Which members are between the first and the last follows from measured latencies, in each of two runs.
    known = ["member dense", "member pruned-1", "member pruned-2", "member final", "cascade"]
    found = {part: [arm for arm in arms[part] if arm.startswith("member ") or arm == "cascade"] for part in arms}
    for part in ("family", "cascade"):
        assert found[part] == [arm for arm in known if arm in found[part]]
        assert {"member dense", "member final", "cascade"} <= set(found[part])
    assert arms["cascade"] == found["cascade"]
    assert arms["adapters"] == ["adapters, uniform", "adapters by gradient", "all weights"]
    trains = {row["arm"]: row["trainable"] for row in rows if row["part"] == "adapters"}
    assert 0 < trains["adapters, uniform"] <= 0.06 * trains["all weights"]
    assert 0 < trains["adapters by gradient"] <= 0.06 * trains["all weights"]
    assert all(row["peak_gib"] > 0 for row in rows if row["part"] == "adapters")
    assert arms["soup"] == ["fine-tuned"] * 3 + ["greedy soup", "uniform soup"]
    assert arms["freezing"] == [
        *("no layer frozen", "fewer steps"),
        *("freezing by schedule", "freezing by signal", "freezing in turns"),
    ]
    assert {"member dense", "member final", "cascade", "int8_dynamic of final", "pruned alone"} <= set(arms["family"])
    assert {"member dense", "elastic, whole", "elastic-1"} <= set(arms["elastic"])
    sizes = {row["arm"]: row["size"] for row in rows if "size" in row}
    assert sizes["int8_dynamic of dense"] < sizes["bf16 of dense"] < 1
    soups = {row["arm"]: row["dev"] for row in rows if row["part"] == "soup"}
    assert soups["greedy soup"] >= max(row["dev"] for row in rows if row["arm"] == "fine-tuned")
    assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_the_language_models_of_the_pruning_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "models.json"
    command = [sys.executable, str(SCRIPTS / "benchmark_pruning_language_model.py"), "--json", str(out)]
    command += ["--seeds", "0", "--steps", "20", "--limit", "32", "--batch-size", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    dense, pruned, small = json.loads(out.read_text())["results"]
    assert (dense["flops"], dense["steps"], pruned["steps"]) == (1, 20, 20)
    assert pruned["flops"] <= 0.5
    assert small["flops"] == pytest.approx(pruned["flops"], abs=0.1)
    assert small["wall_s"] == pytest.approx(pruned["wall_s"], rel=0.3)
    assert 1 < pruned["perplexity"] < 4096
    again = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert "dense, seed 0" not in again.stdout  # all of it was there
    assert again.stdout.splitlines()[-3].startswith("small")


# Learning rate -------------------------------------------------------------------------------------------------------


def lr_result(method: str, rate: float | None, seed: int, loss: float, fault: str | None = None) -> dict[str, Any]:
    losses = {"val_loss": loss, "test_loss": loss, "val_accuracy": None, "test_accuracy": None}
    return {"task": "task", "method": method, "rate": rate, "seed": seed, "fault": fault} | losses


def lr_rows(text: str) -> dict[str, list[str]]:
    """A report's cells by the first of each line; two spaces stand between cells."""
    lines = [[cell for cell in line.split("  ") if cell] for line in text.splitlines()]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if cells}


def test_the_learning_rate_report_counts_excess_and_what_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmark_learning_rate import by_chance, report

    results: list[dict[str, Any]] = [
        {"task": "task", "method": "untrained", "seed": seed, "test_loss": 5.0} for seed in (0, 1, 2)
    ]
    for seed in (0, 1, 2):
        results += [
            lr_result("cosine", 1e-3, seed, 2.0 + seed),
            lr_result("cosine", 1e-2, seed, math.nan),
            lr_result("cosine+ours", 1e-3, seed, 1.9 + seed),
            lr_result("cosine+ours", 1e-2, seed, 3.5),
            lr_result("prodigy", None, seed, 4.0),
        ]
    rows = lr_rows(report("task", False, results))
    # Of the eight ways to swap the two rates of each seed four leave the medians 0.6 apart, four make them equal.
    ours = by_chance({1e-3: {0: 1.9, 1: 2.9, 2: 3.9}, 1e-2: dict.fromkeys((0, 1, 2), 3.5)})
    assert float(ours) == pytest.approx(0.15, abs=0.02)
    assert rows["cosine+ours"] == ["0.300", ours, "0.600", "0.000", "0.600", "-0.100 (-0.100 to -0.100)"]
    bare = by_chance({1e-3: {0: 2.0, 1: 3.0, 2: 4.0}, 1e-2: dict.fromkeys((0, 1, 2), 5.0)})
    assert rows["cosine"] == ["1.100", bare, "2.100", "0.100", "2.100"]  # a run that diverged is worth no training: 5.0
    assert rows["prodigy"] == ["1.100", "1.100", "1.100", "1.100"]  # one result, whatever was typed
    assert list(rows).index("cosine+ours") < list(rows).index("cosine")


def test_the_learning_rate_report_shows_faults_beside_the_undisturbed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmark_learning_rate import report

    results = []
    for seed in (0, 1, 2):
        results += [
            lr_result("cosine", 1e-3, seed, 2.0 + seed),
            lr_result("cosine", 1e-2, seed, 9.0),  # of another rate: not what faults are compared with
            lr_result("cosine", 1e-3, seed, math.nan if seed else 2.5, "nan"),
            lr_result("cosine+ours", 1e-3, seed, 1.75 + seed),
            lr_result("cosine+ours", 1e-3, seed, 2.125 + seed, "nan"),
        ]
    rows = lr_rows(report("task", False, results).partition("faults")[2])
    assert rows["none"] == ["+0.000", "-0.250"]
    assert rows["nan"] == ["+0.500 (2 of 3 lost)", "+0.125"]


def test_workers_end_when_the_learning_rate_benchmark_is_killed(tmp_path: Path) -> None:
    command = [str(SCRIPTS / "benchmark_learning_rate.py"), "--json", str(tmp_path / "rates.json")]
    assert not _alive_after_a_kill([*command, "--jobs", "1", "--parts", "rates"])


def test_a_process_of_a_benchmark_s_own_ends_when_it_is_killed() -> None:
    code = "import signal; from results import run_in_process; run_in_process(signal.pause, what='a pause')"
    assert not _alive_after_a_kill(["-c", code], until_it_runs=1)


def _alive_after_a_kill(arguments: list[str], *, until_it_runs: float = 0) -> list[psutil.Process]:
    """Kills a script of Python once it has processes of its own; returns those that have not ended 30 s later."""
    with subprocess.Popen([sys.executable, *arguments], cwd=SCRIPTS, stderr=subprocess.DEVNULL) as benchmark:
        deadline = time.monotonic() + 60
        while not (workers := _trainings(benchmark.pid)):
            assert benchmark.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(until_it_runs)
        benchmark.kill()
    return psutil.wait_procs(workers, timeout=30)[1]


def _trainings(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_the_learning_rate_benchmark_names_its_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from learning_rate_arms import controller, decades

    def switches(method: str) -> dict[str, bool]:
        made = controller(method)
        return {
            name: bool(getattr(made, name)) for name in ("align", "cap", "plateau", "guard", "recover", "batch_scaling")
        }

    assert controller("cosine") is None
    assert switches("wsd+ours") == dict.fromkeys(switches("wsd+ours"), True)
    assert switches("wsd+ours-align-cap") == switches("wsd+ours") | {"align": False, "cap": False}
    assert switches("wsd+ours-only-cap") == dict.fromkeys(switches("wsd+ours"), False) | {"cap": True}
    assert switches("cosine+ours-batch-recover") == switches("wsd+ours") | {"batch_scaling": False, "recover": False}
    for wrong in ("cosin", "cosine+theirs", "prodigy+ours", "cosine+ours-magic"):
        with pytest.raises(ValueError, match=r"no method|is not SCHEDULE"):
            controller(wrong)
    assert decades(1e-4, 1e-1, 4) == pytest.approx((1e-4, 1e-3, 1e-2, 1e-1))


def test_the_learning_rate_benchmark_puts_sgd_under_the_same_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmark_learning_rate import fault_jobs
    from learning_rate_arms import _use_sgd, make_task

    task = make_task("classifier", model=None, data=None, steps=None, optimizer="sgd")
    module = torch.nn.Linear(2, 2)
    adam = torch.optim.AdamW([{"params": [module.weight], "weight_decay": 0.1}, {"params": [module.bias]}], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.5**step)
    made = {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
    holder = SimpleNamespace(configure_optimizers=lambda: made)
    _use_sgd(holder)
    found = holder.configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.9, 0)] * 2
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25] * 2
    assert max(task.rates) == 3.0
    jobs = fault_jobs([task], ["wsd", "wsd+ours", "cosine+ours-batch"], ["batch"], [], [7])
    assert [(job["fault"], job["method"]) for job in jobs] == [
        *((None, "cosine"), (None, "cosine+ours-batch")),
        *(("batch", "cosine"), ("batch", "cosine+ours-batch")),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "cosin"], "There is no method 'cosin'"),
        (["--tasks", "encoder"], "--tasks encoder needs --model and --data"),
        (["--tasks", "vision"], "invalid choice: 'vision'"),
        (
            ["--optimizer", "sgd", "--methods", "cosine", "prodigy"],
            "prodigy is an AdamW of its own: leave out it or --optimizer sgd",
        ),
    ],
)
def test_the_learning_rate_benchmark_refuses_before_it_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmark_learning_rate import main

    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_others_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_learning_rate as benchmark

    def run(job: dict[str, Any]) -> dict[str, Any]:
        if job["seed"] == 1:
            raise ValueError("no luck")
        return lr_result("cosine", 1e-3, job["seed"], 2.0)

    monkeypatch.setattr(benchmark, "_run", run)
    task = SimpleNamespace(name="task")
    jobs = [{"task": task, "method": "cosine", "rate": 1e-3, "seed": seed} for seed in range(4)]
    with ThreadPoolExecutor(1) as pool, pytest.raises(SystemExit, match=r"1 of 4 runs failed.*no luck"):
        benchmark.Store(tmp_path / "rates.json", {}).fill(pool, jobs)  # pyright: ignore[reportArgumentType]
    kept = benchmark.Store(tmp_path / "rates.json", {})
    assert sorted(result["seed"] for result in kept.results) == [0, 2, 3]
    with pytest.raises(SystemExit, match="other settings"):
        benchmark.Store(tmp_path / "rates.json", {"steps": 3})


@pytest.mark.slow
def test_the_learning_rate_benchmark_runs_and_goes_on_where_it_stopped(tmp_path: Path, small_encoder) -> None:
    model, data = small_encoder
    out, picture = tmp_path / "rates.json", tmp_path / "rates.png"
    command = [sys.executable, str(SCRIPTS / "benchmark_learning_rate.py"), "--json", str(out), "--plot", str(picture)]
    command += ["--tasks", "classifier", "encoder", "--model", str(model), "--data", str(data), "--steps", "12"]
    command += ["--seeds", "0", "--rates", "1e-3", "--methods"]
    done = subprocess.run([*command, "cosine", "--parts", "rates"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads(out.read_text())["results"]
    done = subprocess.run([*command, "cosine*", "p*", "schedulefree"], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text())["results"]
    assert results[: len(first)] == first  # not run again
    losses = {(r["task"], r["method"], r["fault"]): r["test_loss"] for r in results if "fault" in r}
    for task in ("classifier", "encoder"):
        for method in ("cosine", "cosine+ours", "plateau", "prodigy", "schedulefree"):
            assert math.isfinite(losses[task, method, None])
        assert all(math.isfinite(losses[task, "cosine+ours", fault]) for fault in ("nan", "spike", "batch", "prune"))
        assert not math.isfinite(losses[task, "cosine", "nan"])
    ratios = [r["ratio"] for r in results if r["method"] == "overhead plain"]
    assert ratios == [1.0] * 6
    assert "faults at half of the run" in done.stdout
    assert picture.stat().st_size > 1000
