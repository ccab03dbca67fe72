"""Lower precision: a smaller copy of a model, chosen by what it is measured to cost and to lose."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptrain.compression import ao, int4, int8, structured
from adaptrain.compression.ao import AO_METHODS
from adaptrain.compression.layers import convert
from adaptrain.errors import ConfigurationError
from adaptrain.execution.oom import is_out_of_memory
from adaptrain.pruning import cost
from adaptrain.pruning.families import find_family

METHODS = ("none", "bf16", "int8_dynamic", "int8_weight", "int4_weight")
ALL_METHODS = (*METHODS, *AO_METHODS)
QUANTIZED_FILE = "quantized.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of one method.

    Args:
        method: The method.
        latency_ms: The measured time of a forward pass; None where it was not measured.
        size_bytes: The bytes of its weights in a file.
        metric: What `evaluate` returned; None where nothing was to evaluate by.
        refused: Why it is out; None where it is in.
    """

    method: str
    latency_ms: float | None = None
    size_bytes: int | None = None
    metric: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Quantized:
    """A model in lower precision.

    Args:
        model: The model, in evaluation mode.
        method: How it is held.
        trials: What was tried, the model as it was first.
        described: What `load_quantized` builds it from; None for a model of no known family.
    """

    model: Any
    method: str
    trials: tuple[Trial, ...]
    described: Mapping[str, Any] | None = None

    def table(self) -> str:
        """Returns what was tried, a line each: time and size as fractions of the first, metric, and why not."""
        first = self.trials[0]
        rows = [("method", "latency", "size", "metric", "")]
        for trial in self.trials:
            rows.append(
                (
                    trial.method,
                    _ratio(trial.latency_ms, first.latency_ms),
                    _ratio(trial.size_bytes, first.size_bytes),
                    "-" if trial.metric is None else f"{trial.metric:.4g}",
                    "chosen" if trial.method == self.method else trial.refused or "",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:4], widths[1:], strict=True))]
            lines.append("  ".join([*cells, row[4]]).rstrip())
        return "\n".join(lines)


def quantize(
    model: nn.Module,
    method: str = "auto",
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    mode: Literal["max", "min"] = "max",
    max_metric_drop: float = 0.01,
    minimize: Literal["latency", "size"] = "latency",
    candidates: Sequence[str] = METHODS,
) -> Quantized:
    """Returns a copy of a model in lower precision; the model stays as it is.

    | method | what it is | what it buys |
    | --- | --- | --- |
    | `none` | as it is | |
    | `bf16` | weights and arithmetic in bfloat16 | half the size; time where the processor has bfloat16 |
    | `int8_dynamic` | weights in 8 bits, integer arithmetic, inputs rounded too (CPU) | a quarter, and time |
    | `int8_weight` | weights in 8 bits, arithmetic as before | a quarter of the size; it costs time |
    | `int4_weight` | weights in 4 bits, arithmetic as before | a seventh of the size; it costs time |
    | `torchao_int8_dynamic`, `torchao_int8_weight` | the same of linear layers by torchao, also on a GPU | |
    | `auto` | each of `candidates` is built, run, measured and evaluated here; the best that is left | |

    Linear layers and embeddings are rounded after training (no calibration data); norms and biases stay. A pruned model
    keeps its structure, so that both savings multiply. torchao is imported only when one of its methods is asked for.

    Args:
        model: The model, on the device it is to run on.
        method: One of the above.
        example_inputs: What to measure the time with, named inputs; `auto` needs it.
        evaluate: Returns the validation metric of a model; without it `auto` goes by cost alone, and says so in the
            table by leaving the metric out.
        mode: Whether more (`"max"`) or less of the metric is better.
        max_metric_drop: How much worse than the model as it is the metric may be, in its own units.
        minimize: What is best among those: `"latency"`, measured in turns, or `"size"`.
        candidates: What `auto` tries; torchao's methods too where they are named.

    Raises:
        ConfigurationError: An argument is out of its range, or the method does not run here.
    """
    if method not in (*ALL_METHODS, "auto"):
        raise ConfigurationError(f"method must be one of auto, {', '.join(ALL_METHODS)}, got {method!r}.")
    if minimize not in ("latency", "size") or mode not in ("max", "min"):
        raise ConfigurationError(f"minimize must be latency or size and mode max or min, got {minimize!r}, {mode!r}.")
    if isinstance(max_metric_drop, bool) or not isinstance(max_metric_drop, (int, float)) or max_metric_drop < 0:
        raise ConfigurationError(f"max_metric_drop must be a number of at least 0, got {max_metric_drop!r}.")
    check_candidates(candidates)
    if method == "auto" and example_inputs is None:
        raise ConfigurationError("method='auto' measures on this device, and needs example_inputs to do so.")
    has_bf16 = all(p.dtype == torch.bfloat16 for p in model.parameters())  # then it is no other candidate
    others = [name for name in candidates if name != "none" and not (name == "bf16" and has_bf16)]
    wanted = others if method == "auto" else [method]
    built: dict[str, Any] = {"none": _copy_of(model)}
    refused: dict[str, str] = {}
    for name in wanted:
        try:
            built.setdefault(name, _build(model, name))
            _try_out(built[name], example_inputs)
        except Exception as error:  # whatever a kernel that is not there makes torch raise
            if method != "auto":
                if is_out_of_memory(error):
                    raise
                raise ConfigurationError(f"method={method!r} does not run here: {_first_line(error)}") from error
            refused[name] = _first_line(error)
            built.pop(name, None)
    trials = _measure(built, example_inputs, evaluate)
    if method == "auto":
        trials, method = _choose(trials, mode, max_metric_drop, minimize)
    lost = [Trial(method=name, refused=why) for name, why in refused.items()]
    return Quantized(built[method], method, (*trials, *lost), _described(model))


def check_candidates(candidates: Sequence[str]) -> None:
    """Refuses what `auto` could not try.

    Raises:
        ConfigurationError: A name is of no method, or torchao's and that is not installed.
    """
    if isinstance(candidates, str) or not isinstance(candidates, Sequence):
        raise ConfigurationError(f"candidates must be a list out of {', '.join(ALL_METHODS)}, got {candidates!r}.")
    for name in candidates:
        if name not in ALL_METHODS:
            raise ConfigurationError(f"candidates names {name!r}; methods are {', '.join(ALL_METHODS)}.")
        ao.check_installed(name)


def _choose(trials: Sequence[Trial], mode: str, max_drop: float, minimize: str) -> tuple[list[Trial], str]:
    """Returns the trials with those marked that lose too much, and the best of the others; the first is one of them."""
    first, judged = trials[0], [trials[0]]
    for trial in trials[1:]:
        why = None
        if trial.metric is not None and first.metric is not None:
            drop = first.metric - trial.metric if mode == "max" else trial.metric - first.metric
            if math.isnan(drop):
                why = f"its metric is {trial.metric:.4g}, that of the model as it is {first.metric:.4g}"
            elif drop > max_drop:
                why = f"loses {drop:.4g}, more than max_metric_drop={max_drop:g}"
        judged.append(replace(trial, refused=why))
    left = [trial for trial in judged if trial.refused is None]
    best = min(left, key=lambda t: (t.latency_ms if minimize == "latency" else t.size_bytes) or math.inf)
    return judged, best.method


def _measure(
    built: Mapping[str, Any], inputs: Mapping[str, Tensor] | None, evaluate: Callable[[Any], float] | None
) -> list[Trial]:
    times = {} if inputs is None else cost.measure_latency(built, inputs, copies=cost.COPIES)
    return [
        Trial(
            method=name,
            latency_ms=times.get(name),
            size_bytes=size_in_file_bytes(model),
            metric=None if evaluate is None else float(evaluate(model)),
        )
        for name, model in built.items()
    ]


def size_in_file_bytes(model: nn.Module) -> int:
    """Returns the bytes of a model's weights and buffers in a file, those that are shared once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in ao.plain_tensors(model).values())


def _build(model: nn.Module, method: str) -> Any:
    if method == "int8_dynamic" and next(model.parameters()).device.type != "cpu":
        raise ConfigurationError("int8_dynamic runs on the CPU. On a GPU use bf16, or int8_weight for size.")
    quantized = _copy_of(model)
    if method == "bf16":
        return quantized.to(torch.bfloat16)
    if method in ("int8_dynamic", "int8_weight"):
        linear = partial(int8.Int8Linear, dynamic=method == "int8_dynamic")
        return convert(quantized, int8.round_rows, linear, int8.Int8Embedding)
    if method == "int4_weight":
        return convert(quantized, int4.round_groups, int4.Int4Linear, int4.Int4Embedding)
    if method in AO_METHODS:
        return ao.round_linear(quantized, method)
    return quantized


def _copy_of(model: nn.Module) -> Any:
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for module in copied.modules():  # hooks watch the model in training, and are none of the copy's
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied


@torch.no_grad()
def _try_out(model: Any, inputs: Mapping[str, Tensor] | None) -> None:
    if inputs is None:
        return
    output = model(**inputs)
    values = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.logits
    if not torch.isfinite(values.float()).all():
        raise ConfigurationError("its outputs are not finite.")


def save_quantized(quantized: Quantized, path: str | os.PathLike[str], *, tokenizer: Any = None) -> Path:
    """Writes a quantized model as small as it is, for `load_quantized`.

    Args:
        quantized: What `quantize` returned, of a model that `ProgressivePruning` can prune.
        path: The folder; made where it is not there.
        tokenizer: Written along.

    Returns:
        The folder.

    Raises:
        ConfigurationError: The model is of no known family.
    """
    from safetensors.torch import save_model

    if quantized.described is None:
        raise ConfigurationError(
            f"{type(quantized.model).__name__} is of no family that adaptrain can build again. Save it yourself:"
            " torch.save(quantized.model, path)."
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    trials = [vars(trial) | {"metric": _finite(trial.metric)} for trial in quantized.trials]
    about = {**quantized.described, "method": quantized.method, "trials": trials}
    (folder / QUANTIZED_FILE).write_text(json.dumps(about, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if quantized.method in AO_METHODS:
        ao.save_weights(quantized.model, folder / structured.WEIGHTS_FILE)
    else:
        save_model(quantized.model, str(folder / structured.WEIGHTS_FILE), metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    return folder


def load_quantized(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> Any:
    """Loads what `save_quantized` wrote.

    Args:
        path: The folder.
        model: A dense model of full precision to build from, for one that is not of transformers. None: a new one.

    Returns:
        The model, on the CPU and in evaluation mode.

    Raises:
        ConfigurationError: The folder holds no quantized model, or one of another architecture.
    """
    from safetensors.torch import load_model

    folder = Path(path)
    if not (folder / QUANTIZED_FILE).is_file() or not (folder / structured.WEIGHTS_FILE).is_file():
        raise ConfigurationError(
            f"{folder} holds no quantized model: it needs {QUANTIZED_FILE} and {structured.WEIGHTS_FILE}."
        )
    about = json.loads((folder / QUANTIZED_FILE).read_text(encoding="utf-8"))
    built = _build(find_family(structured.rebuild(about, where=folder, model=model)).model, about["method"])
    if about["method"] in AO_METHODS:
        ao.load_weights(built, folder / structured.WEIGHTS_FILE)
    else:
        load_model(built, str(folder / structured.WEIGHTS_FILE))
    return built


def _described(model: nn.Module) -> dict[str, Any] | None:
    try:
        return structured.describe(find_family(model))
    except ConfigurationError:
        return None


def _ratio(value: float | None, first: float | None) -> str:
    return "-" if value is None or not first else f"{value / first:.2f}x"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {text}"
