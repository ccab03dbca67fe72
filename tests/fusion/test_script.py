from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

from tests.fusion.test_merging import tuned
from tests.processes import run_python
from tests.toys import tiny_bert

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuse.py"


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(SCRIPT, *arguments)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two models with their tokenizer, and what they were tuned from."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{index}" for index in range(59))]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    models = {"base": tiny_bert().eval(), "one": tuned(1), "two": tuned(2)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lines = [f"word{index % 50} word{index % 7}\tLABEL_{index % 3}" for index in range(30)]
    (tmp_path / "dev.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n", encoding="utf-8")
    return [tmp_path / name for name in models]


def test_folders_are_fused_into_one_that_transformers_loads(folders: list[Path], tmp_path: Path) -> None:
    base, one, two = folders
    done = run_script(
        one, two, "--method", "task_arithmetic", "--base", base, "--scaling", 0.5, "--out", tmp_path / "f"
    )
    assert done.returncode == 0, done.stderr
    load = AutoModelForSequenceClassification.from_pretrained
    fused, expected = load(tmp_path / "f").state_dict(), {}
    for name, start in load(base).state_dict().items():
        expected[name] = start + 0.5 * sum(load(path).state_dict()[name] - start for path in (one, two))
    assert all(torch.allclose(fused[name], value, atol=1e-6) for name, value in expected.items())
    assert (tmp_path / "f" / "tokenizer.json").is_file()


def test_a_greedy_soup_says_who_joins_and_what_it_reached(folders: list[Path], tmp_path: Path) -> None:
    _, one, two = folders
    arguments = [one, two, "--method", "greedy_soup", "--evaluate", tmp_path / "dev.tsv", "--out", tmp_path / "soup"]
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    reached = [float(line.rpartition(" ")[2].rstrip("%")) for line in done.stdout.splitlines() if "accuracy" in line]
    assert len(reached) == 3
    assert reached[2] >= max(reached[:2])
    assert "with it the soup comes to" in done.stderr
    again = run_script(*arguments)
    assert again.returncode == 2
    assert "holds an export already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["one", "nowhere"], "There is no"),
        (["one", "two", "--method", "ties"], "needs base"),
        (["one", "two", "--method", "greedy_soup"], "needs evaluate"),
        (["one", "two", "--method", "slerp", "--density", "0.5"], "no argument 'density'"),
        (["one", "two", "--evaluate", "missing.csv"], "--evaluate=missing.csv does not exist"),
        (["one", "two", "--evaluate", "odd.csv"], "has the label 'nice'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    folders: list[Path], tmp_path, monkeypatch, capsys, arguments, why
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from fuse import main

    (tmp_path / "odd.csv").write_text("text,label\nword1,nice\nword2,nice\n", encoding="utf-8")
    assert main([*arguments, "--out", "out"]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
