"""Writing a model in the form that its destination can load."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import adaptrain
from adaptrain.compression import graphs, layouts, structured
from adaptrain.errors import ConfigurationError
from adaptrain.pruning import cost, plain
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import Match

LAYOUTS = ("auto", "uniform", "padded", "structured")
FORMATS = ("hf", "onnx", "torch_export")
EXPORT_FILE = "export.json"
_GRAPH_FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written; `export.json` beside it holds the same.

    Args:
        path: The folder.
        format: `"hf"`, `"onnx"` or `"torch_export"`.
        layout: `"uniform"`, `"padded"` or `"structured"`.
        reason: Why this layout.
        model_class: The class of the model.
        params: Parameters that are stored, zeros of padding counted in.
        padding_params: How many of them are zeros of padding. They take the space and time of any other.
        dense_params: Parameters of the model before pruning.
        size_bytes: Bytes of the file that holds the weights.
        weights_file: Its name.
        widths: Kept units of each layer by kind, without padding.
        labels: The classes by index; empty where the model has none.
        inputs: Names of the graph's inputs; empty for `"hf"`.
        difference: The largest difference of the plain model's outputs from this one's, measured at export, as a
            fraction of the largest output; None where the weights are stored as they are.
        load: How to load it, in Python.
        adaptrain: The version that wrote it.
    """

    path: str
    format: str
    layout: str
    reason: str
    model_class: str
    params: int
    padding_params: int
    dense_params: int
    size_bytes: int
    weights_file: str
    widths: list[dict[str, int]]
    labels: list[str]
    inputs: list[str]
    difference: float | None
    load: str
    adaptrain: str = adaptrain.__version__


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    layout: str = "auto",
    format: str = "hf",
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a model, pruned or dense, into a folder; the model itself stays as it is.

    Layouts: `"uniform"` is a plain Hugging Face model of the same shape, where all layers are equally wide and the
    config can say so. `"padded"` is a plain Hugging Face model as wide as the widest layer, filled up with zeros: the
    same outputs up to the rounding of sums, but bigger and slower than the pruned model. `"structured"` keeps the true
    shapes. `"auto"` is the smallest that loads without adaptrain: for `"hf"` uniform, else padded, and structured only
    for a model that is not of transformers; for a graph structured.

    Formats: `"hf"` is a folder for transformers (with `"structured"`: safetensors and `structure.json`, for
    `adaptrain.compression.load`). `"onnx"` (`model.onnx`) and `"torch_export"` (`model.pt2`) are graphs that take
    batches and sequences of any size, and return the logits.

    Args:
        model: A model, or a LightningModule that holds one.
        path: The folder to write; made with its parents.
        layout: `"auto"`, `"uniform"`, `"padded"` or `"structured"`.
        format: `"hf"`, `"onnx"` (needs the extra `export`) or `"torch_export"`.
        tokenizer: A transformers tokenizer to save along; None: none.
        overwrite: Replace an earlier export in `path`.

    Returns:
        What was written.

    Raises:
        ConfigurationError: The layout cannot hold the model, packages are missing, or `path` is in use; nothing was
            written.
    """
    if layout not in LAYOUTS or format not in FORMATS:
        name, value, known = ("layout", layout, LAYOUTS) if layout not in LAYOUTS else ("format", format, FORMATS)
        raise ConfigurationError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    folder = Path(path)
    _check_free(folder, overwrite)
    if format == "onnx":
        graphs.check_onnx()
    found = find_family(model)
    match = Match(copy.deepcopy(found.model).cpu().eval(), found.family)
    layout, reason = _choose(match, layout, format)
    written, difference = match, None
    if layout != "structured":
        rebuild = layouts.uniform if layout == "uniform" else layouts.padded
        written = Match(rebuild(match), match.family)
        difference = layouts.largest_difference(match, written.model)

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        inputs = _write(written, partial, layout, format)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        file = _GRAPH_FILES.get(format, structured.WEIGHTS_FILE)
        params = cost.count_params(written.model)
        result = Exported(
            path=str(folder),
            format=format,
            layout=layout,
            reason=reason,
            model_class=type(match.model).__name__,
            params=params,
            padding_params=params - cost.count_params(match.model),
            dense_params=_dense_params(match),
            size_bytes=sum(
                item.stat().st_size for item in partial.glob(f"{file.split('.')[0]}*.{file.split('.')[1]}*")
            ),
            weights_file=file,
            widths=structures.current_widths(match),
            labels=_labels(match.model),
            inputs=inputs,
            difference=difference,
            load=_how_to_load(match, folder, layout, format),
        )
        (partial / EXPORT_FILE).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return result


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise ConfigurationError(f"{folder} is a file; an export is a folder. Give another path.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / EXPORT_FILE).is_file():
            raise ConfigurationError(f"{folder} holds other files, which an export would mix with. Give another path.")
        if not overwrite:
            raise ConfigurationError(f"{folder} holds an export already. Give another path, or overwrite it.")


def _choose(match: Match, layout: str, format: str) -> tuple[str, str]:
    """Returns the layout and why."""
    if layout != "auto":
        return layout, "asked for"
    if format != "hf":
        return "structured", "a graph holds the true shapes and needs no adaptrain"
    if why := layouts.why_not_plain(match):
        return "structured", f"{why}, so that it loads with adaptrain alone"
    found = plain.obstacles(match, structures.current(match))
    if not found:
        return "uniform", "the config can describe the shape, so plain transformers loads it as small as it is"
    return "padded", f"plain transformers loads it, but not as small as it is: {'; '.join(found)}"


def _write(match: Match, folder: Path, layout: str, format: str) -> list[str]:
    """Writes the model; returns the names of a graph's inputs."""
    if format == "onnx":
        return graphs.write_onnx(match, folder / _GRAPH_FILES[format])
    if format == "torch_export":
        return graphs.write_torch_export(match, folder / _GRAPH_FILES[format])
    if layout == "structured":
        structured.save(match, folder)
    else:
        from transformers.utils import logging

        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            match.model.save_pretrained(str(folder))
        finally:
            if bars:
                logging.enable_progress_bar()
    return []


def _dense_params(match: Match) -> int:
    """Returns the parameters before pruning, from what pruning took away."""
    total = cost.count_params(match.model)
    dense, kept = structures.dimensions(match), structures.current_widths(match)
    if all(layer[kind] == have[kind] for layer, have in zip(dense, kept, strict=True) for kind in have):
        return total
    return cost.count_params(match.hollow_twin())


def _labels(model: Any) -> list[str]:
    config = getattr(model, "config", None)
    named = getattr(config, "id2label", None) if "Classification" in type(model).__name__ else None
    return [str(named[index]) for index in sorted(named)] if named else []


def _how_to_load(match: Match, folder: Path, layout: str, format: str) -> str:
    name, where = type(match.model).__name__, str(folder)
    if format == "onnx":
        return f'import onnxruntime; session = onnxruntime.InferenceSession("{where}/{_GRAPH_FILES[format]}")'
    if format == "torch_export":
        return f'import torch; model = torch.export.load("{where}/{_GRAPH_FILES[format]}").module()'
    if layout == "structured":
        return f'from adaptrain.compression import load; model = load("{where}")'
    return f'from transformers import {name}; model = {name}.from_pretrained("{where}")'
