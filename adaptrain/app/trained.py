"""The model that a run left: built from what the run's folder says of it, without the run's data."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrain.app import resume, runs
from adaptrain.errors import ConfigurationError

MODEL = "model"  # in a run's folder: the dense model's config and the tokenizer
_PREFIX = "model."  # of the Hugging Face model in a text module's state


@dataclass(frozen=True)
class Trained:
    """A model that a run left.

    Args:
        model: The Hugging Face model, in evaluation mode and on the CPU.
        tokenizer: Its tokenizer.
        checkpoint: Where its weights are from.
        step: The optimizer step of the checkpoint.
        finished: Whether the run is finished.
    """

    model: Any
    tokenizer: Any
    checkpoint: Path
    step: int
    finished: bool


def describe(folder: Path, module: Any, data: Any) -> None:
    """Writes what is needed to build a run's model again, but its weights: config and tokenizer.

    Args:
        folder: The run's folder.
        module: The LightningModule; nothing is written of one that holds no Hugging Face model as `model`.
        data: The data module.
    """
    config: Any = getattr(getattr(module, "model", None), "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    config = copy.deepcopy(config)
    config.architectures = [type(module.model).__name__]
    config.save_pretrained(str(folder / MODEL))
    data.tokenizer.save_pretrained(str(folder / MODEL))


def load(path: Path) -> Trained:
    """Loads the model of a run: its newest checkpoint, which is the final model where the run is finished.

    Args:
        path: A run's folder, or a checkpoint in its place in one.

    Raises:
        ConfigurationError: There is no such run or checkpoint, or it is not of one of the app's text models.
    """
    if not path.exists():
        raise ConfigurationError(f"{path} is not there. Give the folder of a run (runs/*/*) or a checkpoint in it.")
    folder = path if path.is_dir() else path.resolve().parent.parent
    described = folder / MODEL
    if path.is_dir() and not (folder / runs.CONFIG_FILE).is_file():
        raise ConfigurationError(f"{path} is no run, it has no {runs.CONFIG_FILE}. Give the folder of a run: runs/*/*.")
    if not (described / "config.json").is_file():
        raise ConfigurationError(
            f"There is no {described / 'config.json'}, which says what model {path} holds. Give a checkpoint in its"
            " place in a run; one of a module of your own is exported in Python: adaptrain.compression.export("
            "adaptrain.load_from_checkpoint(MyModule, path), folder)."
        )
    if path.is_dir():
        try:
            path, _ = resume.newest_checkpoint(folder)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"The run {folder} has no checkpoint that can be read in {folder / runs.CHECKPOINTS}: it ended before"
                " the first was written, or none is whole."
            ) from error
    checkpoint = _read(path)
    weights = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    model = _build(described, checkpoint)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in weights:  # a run in bf16-true or 64-true stays what it is, and as large
            tensor.data = tensor.data.to(weights[name].dtype)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigurationError(f"{path} does not fit the model of the run {folder}: {error}") from error
    from transformers import AutoTokenizer

    from adaptrain.execution.adapters import merge_adapters

    merge_adapters(model)

    return Trained(
        model=model.eval(),
        tokenizer=AutoTokenizer.from_pretrained(str(described)),
        checkpoint=path,
        step=int(checkpoint["global_step"]),
        finished=(folder / resume.SUMMARY_FILE).is_file(),
    )


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        raise ConfigurationError(f"{path} cannot be read as a checkpoint: {type(error).__name__}.") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "global_step"} <= set(checkpoint):
        raise ConfigurationError(f"{path} is no checkpoint of a training run: it has no weights and step.")
    return checkpoint


def _build(described: Path, checkpoint: dict[str, Any]) -> Any:
    import torch
    import transformers

    from adaptrain.pruning.checkpoint import replay

    config: Any = transformers.AutoConfig.from_pretrained(str(described))
    name = config.architectures[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ConfigurationError(
            f"{described} describes a {name}, which transformers {transformers.__version__} lacks."
        )
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    replay(model, checkpoint)
    return model
