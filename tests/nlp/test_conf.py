from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from adaptrain.nlp.data import TokenizedDataModule
from adaptrain.nlp.modules import TextClassifier

CONF = Path(__file__).parents[2] / "conf"
DATA = sorted((CONF / "data").glob("*.yaml"))
MODELS = sorted((CONF / "model").glob("*.yaml"))
SHAPE = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"}


def load(path: Path) -> Any:
    settings = OmegaConf.create({"seed": 5, "model": {"name_or_path": None}, path.parent.name: OmegaConf.load(path)})
    return OmegaConf.to_container(settings, resolve=True)[path.parent.name]  # type: ignore[index]


@pytest.mark.parametrize("path", [*DATA, *MODELS], ids=lambda path: path.stem)
def test_every_argument_has_a_line_with_a_comment(path: Path) -> None:
    keys = set(load(path)) - {"_target_", "_partial_"}
    target: Any = get_class(load(path)["_target_"])
    arguments = set(inspect.signature(target).parameters) - {"options", "data"}
    if path.parent.name == "data":
        arguments |= set(inspect.signature(TokenizedDataModule).parameters) - {"source"}
        if "Corpus" in target.__name__:
            arguments -= {"val_fraction"}  # the corpus brings its own splits
    elif "pretrained" in path.stem:
        arguments -= SHAPE | {"dropout", "tie_word_embeddings"}
    assert keys == arguments
    for line in path.read_text().splitlines():
        assert "#" in line or line.startswith("_target_"), line


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_every_data_module_is_built(path: Path, reviews: dict[str, str]) -> None:
    files = {"train_file": reviews["train_file"]} if "files" in path.stem else {}
    data = instantiate(load(path) | files)
    assert data.task == load(path)["task"]


def test_the_seed_and_the_model_s_tokenizer_reach_the_data() -> None:
    for path in DATA:
        settings = OmegaConf.create({"seed": 5, "model": {"name_or_path": "some/model"}, "data": OmegaConf.load(path)})
        assert settings.data.seed == 5
        assert settings.data.tokenizer == "some/model"


@pytest.mark.parametrize("path", [p for p in MODELS if "pretrained" not in p.stem], ids=lambda path: path.stem)
def test_every_model_is_built_when_its_data_is_there(path: Path, reviews: dict[str, str]) -> None:
    task = "language_model" if path.stem == "llama" else "classification"
    data = instantiate(load(CONF / "data" / "files.yaml") | {**reviews, "task": task, "vocab_size": 300})
    data.setup("fit")
    module = instantiate(load(path))(data=data)
    assert (isinstance(module, TextClassifier)) == (task == "classification")
    assert sum(p.numel() for p in module.parameters()) > 100_000
