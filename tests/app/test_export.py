from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adaptrain.app import trained
from adaptrain.compression import export
from tests.app.conftest import Command, only_run
from tests.compression.test_export import RELOAD
from tests.processes import run_python

SCRIPT = Path(__file__).parents[2] / "scripts" / "export.py"


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(SCRIPT, *arguments)


@pytest.mark.slow
def test_a_run_is_exported_and_loads_without_adaptrain(workplace: Path, command: Command, tiny: list[str]) -> None:
    outcome = command("+experiment=quickstart", *tiny, "budget.latency=null", "budget.params=0.9",
                      "callbacks.pruning.uniform=true")  # fmt: skip
    assert outcome.code == 0, outcome.err
    run = only_run(workplace)
    done = run_script(run, "out")
    assert done.returncode == 0, done.stderr
    assert "step 12, the final model" in done.stdout
    assert "layout uniform" in done.stdout
    assert "labels      bad, good, plain" in done.stdout
    written = json.loads((workplace / "out" / "export.json").read_text())
    assert written["params"] < written["dense_params"]
    assert len({layer["ffn"] for layer in written["widths"]}) == 1
    assert {layer["heads"] for layer in written["widths"]} == {4}

    found = trained.load(run)
    encoded = dict(found.tokenizer(["fine nice", "cold grim dull poor"], padding=True, return_tensors="pt"))
    encoded.pop("token_type_ids", None)
    torch.save([encoded], "cases.pt")
    Path("jobs.json").write_text(json.dumps([{"load": written["load"], "cases": "cases.pt"}]))
    again = subprocess.run([sys.executable, "-c", RELOAD, "jobs.json"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    (outputs,) = torch.load("cases.pt")
    with torch.no_grad():
        torch.testing.assert_close(outputs, found.model(**encoded).logits, rtol=0, atol=1e-6)

    # With the data gone and the checkpoint named, structured as well.
    done = run_script(run / "checkpoints" / "last.ckpt", "small", "--layout", "structured")
    assert done.returncode == 0, done.stderr
    assert "adaptrain.compression import load" in done.stdout
    assert (workplace / "small" / "tokenizer.json").is_file()
    done = run_script(run, "small")
    assert done.returncode == 2
    assert "holds an export already" in done.stderr

    shutil.copy(run / "checkpoints" / "last.ckpt", "elsewhere.ckpt")
    done = run_script("elsewhere.ckpt", "other")
    assert done.returncode == 2
    assert "load_from_checkpoint(MyModule, path)" in done.stderr


def test_a_run_in_bfloat16_is_exported_in_bfloat16(workplace: Path, command: Command, tiny: list[str]) -> None:
    outcome = command("+experiment=quickstart", *tiny, "callbacks=none", "trainer.precision=bf16-true")
    assert outcome.code == 0, outcome.err
    found = trained.load(only_run(workplace))
    assert {weight.dtype for weight in found.model.parameters()} == {torch.bfloat16}
    written = export(found.model, workplace / "out", tokenizer=found.tokenizer)
    assert written.size_bytes < 2.2 * written.params
    assert json.loads((workplace / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_help_explains_layouts_and_formats() -> None:
    done = run_script("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("RUN_DIR_OR_CKPT", "padded", "torch_export"))


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda folder: None, "is not there"),
        (lambda folder: folder.mkdir(), "is no run, it has no config.yaml"),
        (lambda folder: _a_run(folder), "has no checkpoint that can be read"),
    ],
)
def test_what_is_no_run_is_refused_with_a_reason(tmp_path: Path, prepare, why: str) -> None:
    prepare(tmp_path / "run")
    done = run_script(tmp_path / "run", tmp_path / "out")
    assert done.returncode == 2
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def _a_run(folder: Path) -> None:
    (folder / trained.MODEL).mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / trained.MODEL / "config.json").write_text("{}")
