"""What bad input gets: one message that says what was seen and how to fix it, an exit code, and no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptrain.app.errors import user_message
from adaptrain.errors import ConfigurationError
from tests.app.conftest import Command, write_texts

CASES = [
    (["+experiment=nope"], ["experiment/nope", "quickstart", "language_model", "sst2"]),
    (["budget.latency=1.7"], ["budget.latency", "1.7", "budget.latency=0.5"]),
    (["budget.memory_gib=lots"], ["budget.memory_gib", "lots"]),
    (["budget.latencyy=0.5"], ["latencyy", "budget.latency"]),
    (["callbacks.prunning.dry_run=true"], ["prunning", "callbacks.pruning.dry_run"]),
    (["callbacks.batch_size.micro_batch_size=0"], ["micro_batch_size", "0"]),
    (["+callbacks.pruning.foo=1"], ["callbacks.pruning", "foo"]),
    (["callbacks.pruning=7"], ["callbacks.pruning", "7"]),
    (["trainer.accelerator=abacus"], ["trainer", "abacus", "cpu"]),
    (["trainer.accelerator=tpu"], ["trainer", "torch_xla"]),
    (["+trainer.foo=1"], ["trainer", "foo"]),
    (["trainer.devices=-3"], ["trainer", "devices"]),
    (["trainer.max_steps=-1"], ["Nothing ends this run", "trainer.max_steps"]),
    (["seed=-1"], ["seed", "-1"]),
    (["seed=${nope}"], ["nope"]),
    (["experiment_name=../up"], ["experiment_name", "../up"]),
    (["optimized_metric=val/f1"], ["val/f1", "val/accuracy"]),
    (["report.latency_input=[4]"], ["latency_input", "[4]"]),
    (["report.latency_input=[4,4096]"], ["4096"]),
    (["report.baseline=nowhere"], ["nowhere"]),
    (["resume=nowhere"], ["nowhere", "no such folder"]),
    (["resume=."], ["no run", "config.yaml"]),
    (["model.hidden_size=33"], ["33"]),
    (["data.train_file=missing.csv"], ["missing.csv"]),
    (["data.label_column=colour"], ["colour", "label"]),
    (["budget.params=0.01"], ["params", "0.01"]),
    (["model=pretrained", "model.name_or_path=./no_such_model"], ["no_such_model"]),
]

has_mps = torch.backends.mps.is_available()
for device, seen, is_there in (("gpu", "gpu", torch.cuda.is_available() or has_mps), ("mps", "MPS", has_mps)):
    if not is_there:
        CASES.append(([f"trainer.accelerator={device}"], ["trainer", seen, "trainer.accelerator=auto"]))


@pytest.mark.parametrize(("overrides", "said"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_a_user_s_mistake(
    command: Command, tiny: list[str], workplace: Path, overrides: list[str], said: list[str]
) -> None:
    replaced = {override.lstrip("+").partition("=")[0] for override in overrides}
    kept = [item for item in tiny if item.partition("=")[0] not in replaced]
    if "model" in replaced:
        kept = [item for item in kept if not item.startswith("model.")]
    result = command(*kept, *overrides)
    assert result.code in (1, 2)
    for part in said:
        assert part in result.err
    assert "Traceback" not in result.out + result.err
    assert list(workplace.iterdir()) == []


def test_a_label_never_seen_in_training(command: Command, tiny: list[str], workplace: Path) -> None:
    strange = write_texts(workplace / "strange.csv", 8, seed=0)
    strange.write_text(strange.read_text() + "odd words,unheard\n")
    kept = [item for item in tiny if not item.startswith("data.val_file")]
    result = command(*kept, f"data.val_file={strange}")
    assert result.code == 2
    assert "unheard" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_says_how_to_install_it(
    command: Command, tiny: list[str], workplace: Path, logger: str
) -> None:
    try:
        __import__(logger)
    except ImportError:
        pass
    else:
        pytest.skip(f"{logger} is installed")
    result = command(*tiny, f"logger={logger}")
    assert result.code == 2
    assert f'pip install "adaptrain[{logger}]"' in result.err
    assert list(workplace.iterdir()) == []


def test_everything_is_shown_where_asked(command: Command, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigurationError, match=r"1\.7"):
        command(*tiny, "budget.latency=1.7")


def test_an_error_of_ours_is_no_mistake_of_the_user_s() -> None:
    assert user_message(RuntimeError("a bug")) is None
    assert user_message(ImportError("No module named 'adaptrain.nope'", name="adaptrain.nope")) is None


def test_a_refusal_is_found_behind_what_it_was_raised_from() -> None:
    error = RuntimeError("wrapped")
    error.__cause__ = ConfigurationError("the reason")
    assert user_message(error) == "the reason"
