"""A model as a graph that runs without its Python code: ONNX, and torch's own."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.compression.layouts import first_output
from adaptrain.errors import ConfigurationError
from adaptrain.pruning.family import Match

_SHAPE = (2, 8)  # of the example batch; the graph takes any
_LOGGERS = ("torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def check_onnx() -> None:
    """Refuses where the packages that write ONNX are not installed."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"format='onnx' needs {' and '.join(missing)}: pip install \"adaptrain[export]\"."
            " Without them, format='torch_export' gives a graph that needs only torch."
        )


def write_onnx(match: Match, path: Path) -> list[str]:
    """Writes an ONNX file for batches and sequences of any size; returns the names of its inputs.

    Args:
        match: The model, on the CPU, in evaluation mode.
        path: The file.

    Raises:
        ConfigurationError: Packages are missing, or the model's inputs are not those of a text model.
    """
    check_onnx()
    inputs = graph_inputs(match)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Logits(match.model).eval(),
            kwargs=inputs,
            dynamic_shapes=_dynamic(match, inputs),
            input_names=list(inputs),
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(path))
    return list(inputs)


def write_torch_export(match: Match, path: Path) -> list[str]:
    """Writes a `.pt2` file for batches and sequences of any size; returns the names of its inputs.

    Args:
        match: The model, on the CPU, in evaluation mode.
        path: The file.

    Raises:
        ConfigurationError: The model's inputs are not those of a text model.
    """
    inputs = graph_inputs(match)
    with _quiet(), torch.no_grad():
        program = torch.export.export(
            _Logits(match.model).eval(), (), kwargs=inputs, dynamic_shapes=_dynamic(match, inputs)
        )
        torch.export.save(program, str(path))
    return list(inputs)


def graph_inputs(match: Match) -> dict[str, Tensor]:
    """Returns example inputs, by the names that the graph will have them.

    Raises:
        ConfigurationError: The model's inputs are not those of a text model.
    """
    inputs = match.example_inputs(*_SHAPE)
    if getattr(getattr(match.model, "config", None), "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])  # first and second text of a pair
    if "input_ids" not in inputs or not set(inputs) <= set(_INPUTS):
        raise ConfigurationError(
            f"A graph is written of models that read {', '.join(_INPUTS)}; {type(match.model).__name__} reads"
            f" {', '.join(inputs)}. Use format='hf'."
        )
    return inputs


class _Logits(nn.Module):
    """A model that takes tensors by name and returns its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # A cache is an output besides the logits, and no part of one pass over a whole text.
        self._options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Returns the logits."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        return first_output(self.model(**inputs, **self._options))


def _dynamic(match: Match, inputs: dict[str, Tensor]) -> dict[str, Any]:
    positions = getattr(getattr(match.model, "config", None), "max_position_embeddings", None)
    batch = torch.export.Dim("batch")
    sequence = torch.export.Dim("sequence", max=positions) if positions else torch.export.Dim("sequence")
    known = {name: {0: batch, 1: sequence} if name in inputs else None for name in _INPUTS}
    return {name: dims for name, dims in known.items() if name in inputs}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's exporters from telling what a user can do nothing about, such as operators of torchvision."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Its own use of a class that it has deprecated.
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
            # That several inputs have one batch size is meant.
            warnings.filterwarnings("ignore", message=".*axis name: .* will not be used, since it shares.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
