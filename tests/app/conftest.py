"""The command, run in this process, on a tiny text of our own."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from adaptrain.app.train import main

WORDS = {"good": "fine nice bright warm", "bad": "poor dull cold grim", "plain": "door table chair lamp"}


def write_texts(path: Path, count: int, seed: int) -> Path:
    """Writes a csv of short texts whose label can be told from any of their words."""
    generator = random.Random(seed)
    lines = ["text,label"]
    for _ in range(count):
        label = generator.choice(list(WORDS))
        words = (generator.choice(WORDS[label].split()) for _ in range(generator.randint(3, 9)))
        lines.append(f"{' '.join(words)},{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three files of texts."""
    folder = tmp_path_factory.mktemp("texts")
    counts = {"train": 96, "val": 24, "test": 24}
    return {split: write_texts(folder / f"{split}.csv", count, seed=count) for split, count in counts.items()}


@pytest.fixture(scope="session")
def tiny(texts: dict[str, Path]) -> list[str]:
    """Overrides that make a run of a second: a tiny encoder on the files, 12 steps."""
    return [
        "data=files",
        *(f"data.{split}_file={path}" for split, path in texts.items()),
        "data.vocab_size=300",
        "data.max_length=32",
        "data.batch_size=8",
        "model.hidden_size=32",
        "model.num_hidden_layers=2",
        "model.intermediate_size=64",
        "report.latency_input=[4,16]",
        "trainer.max_steps=12",
        "trainer.val_check_interval=4",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "trainer.accelerator=cpu",
    ]


@dataclass
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def workplace(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """An empty working directory; environment and logging are as before when the test ends."""
    monkeypatch.chdir(tmp_path)
    # One cache of tokenized texts for the session, away from the user's.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    environment = dict(os.environ)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    root.handlers[:] = handlers
    root.setLevel(level)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def command(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `python train.py <arguments>` in this process."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def only_run(workplace: Path, pattern: str = "runs/*/*") -> Path:
    """The one run folder there is."""
    (folder,) = workplace.glob(pattern)
    return folder
