"""What keeps a model of a known family from being pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from adaptrain.errors import ConfigurationError
from adaptrain.pruning.projections import projection, submodule

if TYPE_CHECKING:
    from adaptrain.pruning.family import Family, Match


def check(match: Match) -> None:
    """Refuses a model whose units are not held by plain projections of its own.

    Raises:
        ConfigurationError: A projection is no plain linear layer or is shared, or attention has a part that is kept.
    """
    name = type(match.model).__name__
    if getattr(getattr(match.model, "config", None), "add_cross_attention", False):
        raise ConfigurationError(f"{name} cannot be pruned with add_cross_attention=True: its cross-attention is kept.")
    names: dict[int, list[str]] = {}
    for path, parameter in match.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(path)
    for index, layer in enumerate(match.layers):
        for path in projections(match.family):
            found = projection(layer, path)
            if found is None:
                kind = type(submodule(layer, path)).__name__
                raise ConfigurationError(
                    f"{name} cannot be pruned: '{path}' of layer {index} is a {kind}, and only a plain nn.Linear can be"
                    " sliced. Prune before adding adapters or quantizing, or leave pruning out."
                )
            held = [found.weight] if found.bias is None else [found.weight, found.bias]
            shared = [other for parameter in held for other in names[id(parameter)][1:]]
            if shared:
                raise ConfigurationError(
                    f"{name} cannot be pruned: '{path}' of layer {index} is shared with {', '.join(shared)}, which"
                    " would shrink with it."
                )
        if match.family.attention is not None:
            _check_attention(name, index, submodule(layer, match.family.attention.module))
    _check_nested(match)


def projections(family: Family) -> tuple[str, ...]:
    """Returns the paths, from a layer, of every projection that pruning slices, each once."""
    paths: tuple[str, ...] = ()
    if family.attention is not None:
        paths += (family.attention.query, family.attention.key, family.attention.value, family.attention.output)
    if family.ffn is not None:
        paths += (*family.ffn.inputs, family.ffn.output)
    return tuple(dict.fromkeys(paths))


def _check_attention(name: str, index: int, attention: nn.Module) -> None:
    if isinstance(attention, nn.MultiheadAttention) and (attention.bias_k is not None or attention.add_zero_attn):
        raise ConfigurationError(
            f"{name} cannot be pruned: the nn.MultiheadAttention of layer {index} has add_bias_kv or add_zero_attn,"
            " which pruning does not follow. Build it without them."
        )


def _check_nested(match: Match) -> None:
    """Refuses encoders that in evaluation hand nested tensors to a fused kernel, which needs every head."""
    for module in match.model.modules():
        if match.family.attention is None or not isinstance(module, nn.TransformerEncoder):
            continue
        if module.use_nested_tensor:
            raise ConfigurationError(
                f"The heads of {type(match.model).__name__} cannot be pruned while its nn.TransformerEncoder may use"
                " nested tensors. Build it with nn.TransformerEncoder(..., enable_nested_tensor=False)."
            )
