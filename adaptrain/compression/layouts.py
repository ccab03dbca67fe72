"""A pruned model as one that plain transformers can build: of the same shape, or padded with zeros."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import plain
from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import Match
from adaptrain.pruning.surgery import shrink

_SEQUENCE = 8  # tokens of the inputs that two models are compared on
# The largest difference that rounding explains, as a fraction of the largest output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


def why_not_plain(match: Match) -> str | None:
    """Returns why transformers alone cannot build a model of this class, whatever its shape; None where it can."""
    if not type(match.model).__module__.startswith("transformers."):
        return f"{type(match.model).__name__} is not a class of transformers"
    if match.family.config is None:
        return f"the family {match.family.name!r} does not say where a config holds its shape"
    return None


def uniform(match: Match) -> nn.Module:
    """Returns the model as a plain one of the very same shape.

    Args:
        match: The model, on the CPU.

    Raises:
        ConfigurationError: The config cannot describe the shape; the message says why, and what to do.
    """
    if why := why_not_plain(match):
        raise ConfigurationError(f"layout='uniform' cannot hold this model: {why}. Use layout='structured'.")
    if found := plain.obstacles(match, structures.current(match)):
        raise ConfigurationError(
            f"layout='uniform' cannot hold this {type(match.model).__name__}: {'; '.join(found)}. Use layout='padded'"
            " (plain Hugging Face, filled up with zeros), layout='structured' (as small as it is, with adaptrain's"
            " loader) or format='onnx'. To end with uniform layers, prune with ProgressivePruning(uniform=True)."
        )
    widths = structures.current_widths(match)[0]
    return _rebuilt(match, heads=widths["heads"], ffn=widths["ffn"])


def padded(match: Match) -> nn.Module:
    """Returns the model as a plain one as wide as its widest layer, the rest filled up with zeros.

    Zeros change nothing: the added neurons' outputs are multiplied by columns of zeros, and so are the added heads',
    whose values are zeros, too. What differs is the order in which sums are rounded. Where a family's config cannot say
    that there are fewer heads, they are filled up to the dense number.

    Args:
        match: The model, on the CPU.

    Raises:
        ConfigurationError: transformers cannot build a model of this class.
    """
    if why := why_not_plain(match):
        raise ConfigurationError(f"layout='padded' cannot hold this model: {why}. Use layout='structured'.")
    widths = structures.current_widths(match)
    dense = structures.dimensions(match)[0]
    widest = max(layer["heads"] for layer in widths)
    heads = min(count for count in plain.head_counts(match) if count >= widest)
    fields = match.family.config
    assert fields is not None
    has_width = fields.ffn is not None
    return _rebuilt(match, heads=heads, ffn=max(1, *(layer["ffn"] for layer in widths)) if has_width else dense["ffn"])


@torch.no_grad()
def largest_difference(match: Match, other: nn.Module) -> float:
    """Returns the largest difference of two models' outputs, as a fraction of the largest output, with padding."""
    inputs = dict(match.example_inputs(2, _SEQUENCE))
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, _SEQUENCE // 2 :] = 0
    ours, theirs = (first_output(model(**inputs)) for model in (match.model, other))
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))


def first_output(output: Any) -> Tensor:
    """Returns a model's logits, or what else it puts first."""
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def _rebuilt(match: Match, *, heads: int, ffn: int) -> nn.Module:
    model = match.model
    config = plain.plain_config(match, heads=heads, ffn=ffn)
    with torch.random.fork_rng(devices=[]):
        wide = type(model)(config)
    dtype = next(model.parameters()).dtype
    wide.to(dtype=dtype).eval()
    if set(wide.state_dict()) != set(model.state_dict()):
        names = sorted(set(wide.state_dict()) ^ set(model.state_dict()))
        raise ConfigurationError(
            f"{type(model).__name__} does not have the parameters that its config asks for: {', '.join(names[:4])}."
            " Export before parts are added to it or taken out, or use layout='structured'."
        )
    values = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    places = _places(Match(wide, match.family), structures.current_widths(match))
    for name, tensor in (*wide.named_parameters(), *wide.named_buffers()):
        if name in places:
            tensor.zero_().view(-1)[places[name].reshape(-1)] = values[name].reshape(-1)
        else:
            tensor.copy_(values[name])
    difference = largest_difference(match, wide)
    if difference > _TOLERANCE.get(dtype, _HALF_TOLERANCE):
        raise ConfigurationError(
            f"A plain {type(model).__name__} computes something else than this model: outputs differ by"
            f" {difference:.1e} of the largest. It has behaviour that its config does not describe; use"
            " layout='structured'."
        )
    return wide


def _places(wide: Match, widths: list[dict[str, int]]) -> dict[str, Tensor]:
    """Returns, for each parameter that pruning to the first units of each kind would cut, the positions that stay.

    Found by cutting a model whose values are their own positions, so that surgery alone knows how a family is laid out.
    """
    numbered = Match(copy.deepcopy(wide.model).double(), wide.family)  # whole numbers up to 2**53 are exact
    before = {name: parameter.shape for name, parameter in numbered.model.named_parameters()}
    for parameter in numbered.model.parameters():
        parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape))
    shrink(numbered, [{kind: list(range(width)) for kind, width in layer.items()} for layer in widths])
    return {
        name: parameter.long()
        for name, parameter in numbered.model.named_parameters()
        if parameter.shape != before[name]
    }
