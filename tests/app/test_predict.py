"""The command that answers texts with a run's family."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest

from adaptrain import ModelFamily
from tests.app.conftest import WORDS, Command, Outcome, only_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "predict.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("predict", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def predict(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the script in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = load_script().main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def test_a_run_is_asked(
    workplace: Path,
    command: Command,
    tiny: list[str],
    texts: dict[str, Path],
    predict: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = [
        "trainer.max_steps=30",
        "model.lr=0.01",
        "callbacks.pruning.schedule.events=2",
        "budget.latency=null",
        "budget.flops=0.6",
    ]
    outcome = command("+experiment=model_family", *tiny, *more)
    assert outcome.code == 0, outcome.err
    assert "family (members kept): 3 decisions, 0 → 3" in outcome.out
    run = only_run(workplace)

    monkeypatch.setenv("COLUMNS", "120")  # a narrow terminal folds the heads of the columns
    table = predict("--run", run, "--table")
    assert table.code == 0, table.err
    assert all(name in table.out for name in ("dense", "pruned-1", "final", "accuracy", "4x16", "1x16"))

    samples = [line.split(",") for line in texts["val"].read_text().splitlines()[1:]]
    Path("texts.txt").write_text("\n".join(text for text, _ in samples) + "\n")
    answered = predict("--run", run, "texts.txt", "--member", "final", "--batch-size", 7)
    assert answered.code == 0, answered.err
    rows = [line.split("\t") for line in answered.out.splitlines()]
    right = sum(row[0] == label for row, (_, label) in zip(rows, samples, strict=True))
    assert right / len(samples) == pytest.approx(ModelFamily.load(run)["final"].metric)
    assert all(1 / 3 < float(row[1]) <= 1 for row in rows)

    monkeypatch.setattr("sys.stdin", io.StringIO("fine nice\n\nfine\n"))
    answered = predict("--run", run, "--json", "--params-m", 1)
    found = [json.loads(line) for line in answered.out.splitlines()]
    assert [each["text"] for each in found] == ["fine nice", "", "fine"]
    assert found[0]["output"] in WORDS
    assert set(found[0]["scores"]) == set(WORDS)
    assert f"answering: Member('{found[0]['member']}'" in answered.err

    for arguments, why in (
        (("--latency-ms", 1e-6, "--text", "x"), "latency_ms=1e-06 cannot be met: the fastest"),
        (("--latency-ms", -1, "--text", "x"), "latency_ms must be a number greater than 0, got -1.0"),
        (("--member", "tiny", "--text", "x"), "no member 'tiny'"),
        (("--member", "final", "--params-m", 1), "--member, --cascade and limits"),
        (("--cascade", 0.5, "--text", "x"), "24 are too few, it takes 40"),
        (("--cascade", 0, "--text", "x"), "cost must be a number greater than 0, got 0.0"),
        (("nothing.txt",), "There is no file nothing.txt"),
        (("--batch-size", 0, "--text", "x"), "batch_size must be a whole number of at least 1, got 0"),
        (("--device", "abacus", "--text", "x"), "device 'abacus' cannot be used"),
    ):
        refused = predict("--run", run, *arguments)
        assert refused.code == 2
        assert why in refused.err
        assert refused.out == ""


def test_a_run_without_a_family_says_how_to_have_one(tmp_path: Path, predict: Any) -> None:
    refused = predict("--run", tmp_path, "--text", "x")
    assert refused.code == 2
    assert "A run leaves one with the callback FamilyCheckpoint" in refused.err
    assert "There is no folder" in predict("--run", tmp_path / "nothing", "--text", "x").err
