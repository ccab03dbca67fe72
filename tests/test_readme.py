"""What the README says happens."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import adaptrain
from adaptrain.app.config import config_dir

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {
        line.strip().removeprefix("$ ")
        for line in README.replace("\\\n", " ").splitlines()
        if re.match(r"(    |\$ )python train\.py ", line)
    }
)


def shown(command: str) -> str:
    """The output that the README shows for `command`."""
    found = re.search(rf"<!-- output: {re.escape(command)} -->\n```text\n(.*?)\n```", README, flags=re.DOTALL)
    assert found, command
    return found[1]


def test_the_list_of_experiments_is_the_one_shown():
    result = subprocess.run([sys.executable, "train.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.rstrip() == shown("python train.py")


def test_commands_were_found():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command):
    words = [word for word in shlex.split(command)[2:] if word not in ("-m", "--help")]
    overrides = [re.sub(r"<[^>]*>", "x", word) for word in words]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert compose("train", overrides).data._target_.startswith("adaptrain.")


def test_every_public_name_it_uses_is_there():
    names = set(re.findall(r"adaptrain\.([A-Za-z_]+)\(", README))
    names |= set(re.findall(r"`([A-Z][A-Za-z]+)`", README)) & set(dir(adaptrain))
    assert {"BatchSizeController", "ProgressivePruning", "load_from_checkpoint"} <= names
    for name in names:
        assert hasattr(adaptrain, name)


def test_every_option_and_file_it_names_is_there():
    row = re.search(r"\| `logger=(.*?)` \|", README)
    assert row
    for name in re.split(r"[`, ]+", row[1]):
        assert (config_dir() / "logger" / f"{name}.yaml").exists()
    row = re.search(r"\| `\+debug=(.*?)` \|", README)
    assert row
    for name in re.split(r"[`, ]+", row[1]):
        assert (config_dir() / "debug" / f"{name}.yaml").exists()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/measurements.md"])
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if path.startswith("http"):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_make_target_it_names_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^    make ([a-z-]+)", README, flags=re.MULTILINE))
    assert named
    assert named <= targets
