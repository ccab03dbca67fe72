"""Merging models of one architecture into one of the same size."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from adaptrain.errors import ConfigurationError
from adaptrain.fusion import methods
from adaptrain.fusion.sources import Given, Source, check_compatible, read

_log = logging.getLogger(__name__)

_TAKES: dict[str, dict[str, Any]] = {  # by method: its arguments, and their defaults
    "uniform_soup": {"weights": None},
    "greedy_soup": {"evaluate": None, "mode": "max"},
    "wise_ft": {"base": None, "alpha": 0.5},
    "slerp": {"t": 0.5},
    "task_arithmetic": {"base": None, "scaling": 0.4},
    "ties": {"base": None, "density": 0.2, "scaling": 1.0},
    "dare": {"base": None, "density": 0.2, "scaling": 0.4, "seed": 0},
    "model_stock": {"base": None},
}
METHODS = tuple(_TAKES)
_COUNT: dict[str, tuple[int, float]] = {"wise_ft": (1, 1), "slerp": (2, 2), "model_stock": (2, math.inf)}


def merge(
    models: Sequence[Given],
    method: str = "uniform_soup",
    *,
    base: Given | None = None,
    weights: Sequence[float] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    mode: Literal["max", "min"] | None = None,
    alpha: float | None = None,
    t: float | None = None,
    scaling: float | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> Any:
    """Merges models into one of the same architecture and size.

    They have to differ in nothing but the values of their weights, and should come from one initialisation, as models
    fine-tuned from the same pretrained one do. Pruned ones must have the same units left.

    | method | what it needs, beside the models |
    | --- | --- |
    | `uniform_soup` | their mean; `weights` for another than the plain one (Wortsman et al. 2022) |
    | `greedy_soup` | `evaluate`; from the best on, each joins the mean if that is no worse; none of nan (the same) |
    | `wise_ft` | one model and its `base`; `alpha` of the model, 0.5 (Wortsman et al. 2021) |
    | `slerp` | two models; `t` of the way from the first to the second, 0.5 (Shoemake 1985) |
    | `task_arithmetic` | `base`; the changes summed, times `scaling`, 0.4 (Ilharco et al. 2023) |
    | `ties` | `base`; `density` of the changes kept, 0.2, `scaling` 1.0 (Yadav et al. 2023) |
    | `dare` | `base`; `density` kept at random, 0.2, `scaling` 0.4, `seed` 0 (Yu et al. 2024) |
    | `model_stock` | `base`; by the angle between the changes (Jang et al. 2024) |

    Tensors are merged one after another in float32 (float64 stays), on the device they are on, and come back in their
    dtype. Values that are no floating-point numbers have to agree.

    Args:
        models: Models, state dicts, checkpoints of Lightning or torch, safetensors files, folders of Hugging Face or of
            `adaptrain.compression.export`.
        method: One of the above.
        base: What the models were fine-tuned from.
        weights: A weight for each model, at least 0; they are scaled to sum to 1.
        evaluate: Returns the held-out metric of a merged model (given as the result is returned).
        mode: Whether more (`"max"`, the default) or less of that metric is better.
        alpha: The share of the fine-tuned model, in [0, 1].
        t: The share of the way, in [0, 1].
        scaling: λ, what the summed changes are multiplied with.
        density: The share of the changes that is kept, in (0, 1].
        seed: Of what is dropped at random.

    Returns:
        A new model like the first (a module or a folder), or a state dict where the first is one or a checkpoint.

    Raises:
        ConfigurationError: The models differ, named by the first difference; or an argument is missing, out of its
            range, or not one of the method's; or `evaluate` returned nan for every model.
    """
    given = {
        "base": base,
        "weights": weights,
        "evaluate": evaluate,
        "mode": mode,
        "alpha": alpha,
        "t": t,
        "scaling": scaling,
        "density": density,
        "seed": seed,
    }
    options = _read_options(method, given, len(models))
    sources = [read(model, f"model {index + 1}") for index, model in enumerate(models)]
    start = None if options.get("base") is None else read(options["base"], "base")
    check_compatible([*sources, start] if start is not None else sources)
    if method == "greedy_soup":
        return _greedy(sources, options)
    combine = _combine(method, options, sources, start)
    return _result(sources[0], _merge_states([source.state for source in sources], start and start.state, combine))


def _combine(
    method: str, options: Mapping[str, Any], sources: Sequence[Source], start: Source | None
) -> Callable[[list[Tensor], Tensor], Tensor]:
    """Returns what merges one tensor, given those of the models and of the base (the first model's where none is)."""
    if method == "wise_ft":
        return lambda tensors, base: methods.wise_ft(base, tensors[0], options["alpha"])
    if method == "slerp":
        return lambda tensors, _: methods.slerp(tensors[0], tensors[1], options["t"])
    if method == "task_arithmetic":
        return lambda tensors, base: methods.task_arithmetic(base, tensors, options["scaling"])
    if method == "ties":
        assert start is not None
        limits = [_threshold(source.state, start.state, options["density"]) for source in sources]
        return lambda tensors, base: methods.ties(base, tensors, limits, options["scaling"])
    if method == "dare":
        random = torch.Generator().manual_seed(options["seed"])
        return lambda tensors, base: methods.dare(base, tensors, options["density"], options["scaling"], random)
    if method == "model_stock":
        return lambda tensors, base: methods.model_stock(base, tensors)
    return lambda tensors, _: methods.average(tensors, options["weights"])


@torch.no_grad()
def _merge_states(
    states: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None,
    combine: Callable[[list[Tensor], Tensor], Tensor],
) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    tied: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in states[0].items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in tied:
            merged[name] = merged[tied[place]]
            continue
        tied[place] = name
        if not tensor.is_floating_point():
            merged[name] = tensor.clone()
            continue
        exact = torch.promote_types(tensor.dtype, torch.float32)
        tensors = [state[name].to(tensor.device, exact) for state in states]
        start = tensors[0] if base is None else base[name].to(tensor.device, exact)
        merged[name] = combine(tensors, start).to(tensor.dtype)
    return merged


@torch.no_grad()
def _threshold(state: Mapping[str, Tensor], base: Mapping[str, Tensor], density: float) -> float:
    """Returns the size that the largest `density` of all that fine-tuning changed have at least."""
    seen: set[int] = set()
    sizes = []
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            sizes.append((tensor.float() - base[name].to(tensor.device).float()).abs().flatten().cpu())
    changes = torch.cat(sizes)
    kept = max(1, round(density * len(changes)))
    return float(changes.kthvalue(len(changes) - kept + 1).values)


def _greedy(sources: Sequence[Source], options: Mapping[str, Any]) -> Any:
    """Returns the greedy soup; on its way it says who joins."""
    evaluate, sign = options["evaluate"], 1 if options["mode"] == "max" else -1

    def mean(chosen: Sequence[Source]) -> Any:
        state = _merge_states([source.state for source in chosen], None, lambda tensors, _: methods.average(tensors))
        return _result(chosen[0], state)

    metrics = [float(evaluate(mean([source]))) for source in sources]
    ranked = sorted(range(len(sources)), key=lambda index: (math.isnan(metrics[index]), -sign * metrics[index], index))
    if math.isnan(metrics[ranked[0]]):
        raise ConfigurationError("evaluate returned nan for every model, so that none can be chosen.")
    chosen, best = [sources[ranked[0]]], metrics[ranked[0]]
    soup = mean(chosen)
    for index in ranked[1:]:
        if math.isnan(metrics[index]):
            _log.warning("%s stays out: its metric alone is nan.", sources[index].name)
            continue
        candidate = mean([*chosen, sources[index]])
        metric = float(evaluate(candidate))
        joins = sign * metric >= sign * best
        _log.info(
            "%s, %.4g alone: with it the soup comes to %.4g from %.4g, so it %s.",
            sources[index].name,
            metrics[index],
            metric,
            best,
            "joins" if joins else "stays out",
        )
        if joins:
            chosen, soup, best = [*chosen, sources[index]], candidate, metric
    return soup


def _result(like: Source, state: dict[str, Tensor]) -> Any:
    if like.module is None:
        return state
    merged = copy.deepcopy(like.module)
    merged.load_state_dict(state)
    if any(isinstance(module, _NormBase) and module.track_running_stats for module in merged.modules()):
        _log.warning(
            "The statistics of BatchNorm were merged like weights, and do not fit the merged ones: compute them anew"
            " on training data with torch.optim.swa_utils.update_bn."
        )
    return merged


def _read_options(method: str, given: Mapping[str, Any], count: int) -> dict[str, Any]:
    if method not in _TAKES:
        raise ConfigurationError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    least, most = _COUNT.get(method, (1, math.inf))
    if not least <= count <= most:
        wanted = f"{least}" if least == most else f"at least {least}"
        raise ConfigurationError(f"method={method!r} merges {wanted} model{'s' * (least > 1)}, got {count}.")
    takes = _TAKES[method]
    for name, value in given.items():
        if value is not None and name not in takes:
            raise ConfigurationError(
                f"method={method!r} has no argument {name!r}; it takes {', '.join(takes)}. Leave {name} out."
            )
    options = {name: default if given[name] is None else given[name] for name, default in takes.items()}
    for name in ("base", "evaluate"):
        if name in options and options[name] is None:
            what = "the model that the others were fine-tuned from" if name == "base" else "a function of a model"
            raise ConfigurationError(f"method={method!r} needs {name}: {what}.")
    if "evaluate" in options and not callable(options["evaluate"]):
        raise ConfigurationError(f"evaluate must be a function of a model, got {options['evaluate']!r}.")
    if options.get("mode", "max") not in ("max", "min"):
        raise ConfigurationError(f"mode must be 'max' or 'min', got {options['mode']!r}.")
    for name in ("alpha", "t"):
        if not 0 <= _number(name, options.get(name, 0)) <= 1:
            raise ConfigurationError(f"{name} must lie in [0, 1], got {options[name]!r}.")
    if not 0 < _number("density", options.get("density", 1)) <= 1:
        raise ConfigurationError(f"density must lie in (0, 1], got {options['density']!r}.")
    _number("scaling", options.get("scaling", 1))
    if (weights := options.get("weights")) is not None:
        values = [_number("weights", weight) for weight in weights]
        if len(values) != count or min(values) < 0 or sum(values) <= 0:
            raise ConfigurationError(
                f"weights must be one number of at least 0 for each of the {count} models, not all 0; got {weights!r}."
            )
    return options


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigurationError(f"{name} must be a number, got {value!r}.")
    return float(value)
