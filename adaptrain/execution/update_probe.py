"""What an optimizer is about to do, measured on its state: the direction and the size of its update."""

# pyright: reportPrivateImportUsage=false
# torch offers its fused list operations under private names only.

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

Kind = Literal["adam", "momentum"]

_OWN_RATE = ("schedulefree", "prodigy", "dadapt", "mechanic", "ldog")
_OWN_RATE_KEYS = ({"d", "d0"}, {"train_mode", "weight_sum"})
_SAMPLE = 1 << 18  # elements a probe looks at, about
_WHOLE = 1 << 12  # elements of a tensor that is always looked at whole


def sets_own_rate(optimizer: Optimizer) -> bool:
    """Whether the optimizer finds its rate itself (schedule-free, Prodigy, D-Adaptation, DoG)."""
    name = type(optimizer).__name__.lower().replace("_", "")
    keys = set(optimizer.param_groups[0])
    return name == "dog" or any(word in name for word in _OWN_RATE) or any(own <= keys for own in _OWN_RATE_KEYS)


def update_kind(optimizer: Optimizer) -> Kind | None:
    """Tells which rule the optimizer's state shows, or promises while it is still empty.

    Returns:
        `"adam"` for first and second moments under torch's names, `"momentum"` for a momentum buffer, None else.
    """
    for state in optimizer.state.values():
        if state:
            if isinstance(state.get("exp_avg"), Tensor) and isinstance(state.get("exp_avg_sq"), Tensor):
                return "adam"
            return "momentum" if isinstance(state.get("momentum_buffer"), Tensor) else None
    group = optimizer.param_groups[0]
    if isinstance(group.get("betas"), (tuple, list)) and len(group["betas"]) == 2 and "eps" in group:
        return "adam"
    return "momentum" if group.get("momentum") else None


def why_off(optimizer: Optimizer, factors: Sequence[str]) -> str | None:
    """Returns why factors that need to read the update cannot serve this optimizer, or None where they can."""
    name = type(optimizer).__name__
    if sets_own_rate(optimizer):
        return f"{name} sets its own rate: the guard alone is on"
    if update_kind(optimizer) is None:
        return f"{name} keeps no direction that can be read: {' and '.join(factors)} stay off"
    return None


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """Returns the gradients of the optimizer's parameters; of a sparse one its values."""
    found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [g.coalesce().values() if g.is_sparse else g for g in found]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the norm of all tensors together as a scalar on the first one's device; not finite where any is not."""
    found = [torch.view_as_real(t) if t.is_complex() else t for t in tensors if t.numel()]
    if not found:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([n.to(found[0].device) for n in _norms(found)]))


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """Returns the norm of all gradients as a scalar; not finite where any gradient is not."""
    return total_norm(gradients(optimizer))


def reference_sizes(optimizer: Optimizer) -> list[float]:
    """Returns by what updates are measured: the root mean square of every weight's singular values.

    That is ‖θ‖_F/√rank, with the rank a matrix of its shape can have; of more than two dimensions the first is one
    side and the others together are the other. In the optimizer's order, 0 for complex parameters and those of fewer
    than two dimensions.
    """
    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    matrices = [p for p in parameters if _is_matrix(p)]
    norms = iter(_floats(_norms(matrices)) if matrices else [])
    return [next(norms) / math.sqrt(_rank(p)) if _is_matrix(p) else 0.0 for p in parameters]


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and parameter.numel() > 0 and not parameter.is_complex()


def _rank(weight: Tensor) -> int:
    return min(len(weight), weight.numel() // len(weight))


def were_trained(parameters: Iterable[Tensor]) -> bool:
    """Tells whether weights were trained before: most vectors (biases, scales of norms) hold more than one value.

    Fresh ones are constant under the usual initialisations. Without vectors the answer is no.
    """
    vectors = [p.detach() for p in parameters if p.ndim == 1 and p.numel() > 1]
    return 2 * sum(bool((p != p[0]).any()) for p in vectors) > len(vectors)


def probe(optimizer: Optimizer, references: Sequence[float], *, turn: int = 0) -> tuple[float | None, float | None]:
    """Measures the update before it is taken, on the optimizer's state as the last step left it.

    Where there is no state yet (the first step), Adam's update is ±1 in every element and momentum's the gradient.
    Of a model of more than a quarter of a million parameters it looks at every k-th row of each matrix, about as many
    elements together, and scales what it finds: all of them would cost as much as the optimizer's step.

    Args:
        optimizer: One of a known `update_kind`, with gradients in place (unscaled, before clipping).
        references: What `reference_sizes` returned when the weights were last taken as the measure.
        turn: Counts the probes, so that each looks at other rows.

    Returns:
        cos(g, u) between the gradient and the direction of the update, and the median over the parameters of two or
        more dimensions of ‖û‖_F/σ_ref, the relative change per unit of the highest rate among the groups. Each None
        where it cannot be known.
    """
    kind = update_kind(optimizer)
    if kind is None:
        return None, None
    dots, directions, squares, ratios = [], [], [], []
    top = max(float(group["lr"]) for group in optimizer.param_groups)
    for batch in _sampled(optimizer, references, turn):
        grads, moments, seconds, weights, scales, epsilons, references_, rates = (
            list(column) for column in zip(*batch, strict=True)
        )
        stateful = moments[0] is not None
        if stateful and kind == "adam":
            moves = _adam_direction(moments, seconds, epsilons)
        elif stateful:
            moves = moments
        else:
            moves = [g.sign() for g in grads] if kind == "adam" else grads
        norms = _norms(moves)
        if stateful:
            products = torch._foreach_mul(moves, grads)
            # The sum of a product, in fused operations: twice its positive part less its absolute sum.
            absolute = _norms(products, 1)
            torch._foreach_clamp_min_(products, 0.0)
            positive = _norms(products, 1)
            share = torch.tensor(weights, dtype=norms[0].dtype, device=norms[0].device)
            dots.append((share * (2 * torch.stack(positive) - torch.stack(absolute))).sum())
            directions.append((share * torch.stack(norms).square()).sum())
            own = torch.stack(_norms(grads))
            squares.append((share * own.square()).sum())
        for norm, weight, scale, reference, rate in zip(
            _floats(norms), weights, scales, references_, rates, strict=True
        ):
            if reference > 0:
                ratios.append(norm * math.sqrt(weight) * scale / reference * (rate / top if top > 0 else 1.0))
    length = math.sqrt(sum(_floats(directions))) * math.sqrt(sum(_floats(squares)))
    cosine = sum(_floats(dots)) / length if length > 0 else None
    return cosine, median(ratios) if ratios else None


def _norms(tensors: list[Tensor] | tuple[Tensor, ...], order: int = 2) -> list[Tensor]:
    # At least float32: the squares of half-precision numbers overflow where the numbers do not.
    wide = any(t.dtype == torch.float64 for t in tensors)
    return list(torch._foreach_norm(tensors, order, torch.float64 if wide else torch.float32))


def _adam_direction(moments: list[Tensor], seconds: list[Tensor], epsilons: list[float]) -> list[Tensor]:
    """Returns m/(√v+ε) for every tensor."""
    scale = torch._foreach_sqrt(seconds)
    torch._foreach_add_(scale, epsilons)
    return list(torch._foreach_div(moments, scale))


def _sampled(optimizer: Optimizer, references: Sequence[float], turn: int) -> Iterator[list[tuple[Any, ...]]]:
    """Yields (g, m, v, weight, scale of ‖u‖, ε, σ_ref, rate) per parameter, in a list for each device and type.

    The tensors are samples where there are many elements; `weight` is how many elements each stands for.
    """
    found: dict[Any, list[tuple[Any, ...]]] = {}
    dense = [p for group in optimizer.param_groups for p in group["params"] if _is_probed(p)]
    stride = -(-sum(p.numel() for p in dense) // _SAMPLE)
    index = -1
    for group in optimizer.param_groups:
        for p in group["params"]:
            index += 1
            if not _is_probed(p):
                continue
            state = optimizer.state.get(p) or {}
            m, v = state.get("exp_avg", state.get("momentum_buffer")), state.get("exp_avg_sq")
            scale, epsilon = _bias_correction(group, state) if v is not None else (1.0, 0.0)
            rows, weight = _rows(p, stride, turn)
            tensors = [None if t is None else t if rows is None else t[rows].contiguous() for t in (p.grad, m, v)]
            entry = (*tensors, weight, scale, epsilon, references[index], float(group["lr"]))
            found.setdefault((p.device, p.dtype, m is not None), []).append(entry)
    yield from found.values()


def _is_probed(parameter: Tensor) -> bool:
    grad = parameter.grad
    return grad is not None and not grad.is_sparse and not grad.is_complex() and parameter.numel() > 0


def _rows(parameter: Tensor, stride: int, turn: int) -> tuple[tuple[slice, ...] | None, float]:
    """Returns which slices of a tensor to look at, along its longest dimension, and what an element stands for."""
    if stride == 1 or parameter.numel() <= _WHOLE:
        return None, 1.0
    longest = max(range(parameter.ndim), key=lambda dimension: parameter.shape[dimension])
    size = parameter.shape[longest]
    step = min(stride, size)
    chosen = slice(turn % step, None, step)
    return (*[slice(None)] * longest, chosen), size / len(range(*chosen.indices(size)))


def _bias_correction(group: dict[str, Any], state: dict[str, Any]) -> tuple[float, float]:
    """Returns what ‖m/(√v+ε)‖ is to be multiplied by to be the update's, and the ε that goes with it."""
    step = float(state.get("step", group.get("step", 0)) or 0)
    if step < 1:
        return 1.0, float(group["eps"])
    first, second = (1 - float(beta) ** step for beta in group["betas"])
    return math.sqrt(second) / first, float(group["eps"]) * math.sqrt(second)


def _floats(values: Sequence[Tensor]) -> list[float]:
    return torch.stack(list(values)).tolist() if values else []
