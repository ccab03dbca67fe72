"""The benchmarks' own machinery: trainings that take turns, and a small run of every part that needs no data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.toys import TextModule, quiet_trainer, text_loader, text_samples, weights

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
    command = [sys.executable, str(SCRIPTS / "benchmark_memory.py"), "--data", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
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
    arms = ["dense", "ours@0.7", "ours+tokens+distillation@0.7", "tp-taylor@0.7", "tp-magnitude@0.7", "lightning@0.5"]
    done = subprocess.run([*command, "--arms", *arms[:1]], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([*command, "--arms", *arms], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dense, seed 0" not in done.stdout  # it was there already
    results = {result["arm"]: result for result in json.loads(out.read_text())["results"]}
    assert list(results) == arms
    assert results["lightning@0.5"]["zeros"] == pytest.approx(0.5, abs=0.05)
    assert results["ours@0.7"]["params"] < results["dense"]["params"]
    assert picture.stat().st_size > 1000


def test_the_pruning_benchmark_refuses_arms_and_options_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from pruning_arms import Job

    def wrong(arm: str) -> str | None:
        return Job(arm, 0, "", "", 1, None, 8, 1e-4, 1, "32-true", None).unknown()

    assert wrong("ours+layers+distillation@0.5") is None
    assert "no arm 'theirs@0.5'" in str(wrong("theirs@0.5"))
    assert "no option 'magic'" in str(wrong("ours+magic@0.5"))
    assert "no option 'layers'" in str(wrong("dense+layers"))
