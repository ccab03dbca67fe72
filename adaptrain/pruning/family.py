"""What a family of architectures declares to be prunable, and a model that was found to be of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.pruning import cost
from adaptrain.pruning.hollow import hollow_model

KINDS = ("heads", "ffn")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Where a layer keeps its attention heads. Paths start at the layer.

    A path leads to a linear module (or GPT-2's `Conv1D`), or to two parameters up to their `_weight` and `_bias`: for
    torch's `nn.MultiheadAttention`, `"self_attn.in_proj"`. A projection into which several are fused, one after
    another and of one size, is named for each of them, in their order. A negative number in a path counts from the
    end of an `nn.ModuleList`.

    The unit that is pruned is a key-value head together with the query heads that read it; without grouped queries
    that is one head.

    Args:
        module: The module that splits the heads, called with the hidden states first, that returns a tuple whose
            first element is the attention output.
        query: The query projection, whose outputs are ordered by key-value head.
        key: The key projection.
        value: The value projection.
        output: The projection of the concatenated heads, inside of `module` or after it.
        head_size: The attribute of `module` that holds the width of one head.
        counts: Attributes of `module` that hold the number of query heads, where it has them.
        widths: Attributes of `module` that hold the number of query heads times the width of one, where it has them.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    head_size: str
    counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """Where a layer keeps its feed-forward neurons. Paths start at the layer, as those of `Attention`.

    Args:
        inputs: The projections whose outputs are the neurons: one, or gate and up; one that holds both is named twice.
        output: The projection whose inputs are the neurons.
    """

    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True, kw_only=True)
class ConfigFields:
    """The fields of a family's Hugging Face config that hold its shape, the same for all layers.

    Args:
        layers: The number of layers.
        ffn: The number of feed-forward neurons; None where no field holds it.
        query_heads: The number of query heads; None where the width of a head follows from it, as in BERT
            (hidden size / heads), so that a model with fewer heads cannot be described.
        key_value_heads: The number of key-value heads.
        head_size: The width of one head.
    """

    layers: str
    ffn: str | None = None
    query_heads: str | None = None
    key_value_heads: str | None = None
    head_size: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of architectures that share the places of their prunable parts.

    Args:
        name: The family's name, kept in checkpoints.
        matches: Whether a module is a model of this family.
        layers: The path from the backbone to the `nn.ModuleList` of its layers; or several, as encoder and decoder,
            of which a model may lack some.
        attention: Where the heads are; None where they cannot be pruned.
        ffn: Where the feed-forward neurons are; None where they cannot be pruned.
        kept: Why units of a kind cannot be pruned, by kind: told to those who ask for it.
        backbone: Returns the module that `layers` starts from.
        dense_twin: Builds a dense model like the one given, any weights, for measuring.
        example_inputs: Builds inputs `(model, batch_size, sequence_length) -> dict`, for measuring.
        config: Where the Hugging Face config holds the shape, for exports that need nothing but transformers; None
            where there is no such config.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    layers: str | tuple[str, ...]
    attention: Attention | None
    ffn: FeedForward | None
    kept: Mapping[str, str] = field(default_factory=dict)
    backbone: Callable[[Any], nn.Module] = field(default=lambda model: model.base_model)
    dense_twin: Callable[[Any], nn.Module] = field(default=lambda model: type(model)(copy.deepcopy(model.config)))
    example_inputs: Callable[[Any, int, int], dict[str, Tensor]] = cost.example_inputs
    config: ConfigFields | None = None


@dataclass(frozen=True)
class Match:
    """A model that was found, and the family that says how to prune it.

    Args:
        model: The model.
        family: Its family.
    """

    model: Any
    family: Family

    @property
    def stacks(self) -> list[nn.ModuleList]:
        """The lists that hold the model's layers: one, or an encoder's and a decoder's."""
        backbone, paths = self.family.backbone(self.model), self.family.layers
        if isinstance(paths, str):
            return [backbone.get_submodule(paths)]  # type: ignore[list-item]
        return [backbone.get_submodule(path) for path in paths if hasattr(backbone, path.split(".")[0])]  # type: ignore[misc]

    @property
    def layers(self) -> list[nn.Module]:
        """The model's layers, also those that are dropped; where there are several stacks, one after another."""
        return [getattr(layer, "replaced", layer) for stack in self.stacks for layer in stack]

    def put_layer(self, index: int, layer: nn.Module) -> None:
        """Puts a module into the place of a layer."""
        for stack in self.stacks:
            if index < len(stack):
                stack[index] = layer
                return
            index -= len(stack)

    def keep_layers(self, layers: Iterable[int]) -> None:
        """Takes all other layers out of the model."""
        kept, first = set(layers), 0
        for stack in self.stacks:
            own = [layer for index, layer in enumerate(stack, first) if index in kept]
            first += len(stack)
            del stack[:]
            stack.extend(own)

    def dense_twin(self) -> nn.Module:
        """Returns a new dense model of the same class, dtype and device, for measuring; its weights are random.

        The random state of the process is left as it was.
        """
        parameter = next(self.model.parameters())
        return self._build().to(device=parameter.device, dtype=parameter.dtype)

    def hollow_twin(self) -> nn.Module:
        """Returns what `dense_twin` returns, but with matrices that take no memory: to be counted, not to be used."""
        return hollow_model(self._build, like=next(self.model.parameters()))

    def _build(self) -> nn.Module:
        parameter = next(self.model.parameters())
        devices = [parameter.device] if parameter.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return self.family.dense_twin(self.model)

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Tensor]:
        """Returns inputs of one shape on the model's device."""
        inputs = self.family.example_inputs(self.model, batch_size, sequence_length)
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in inputs.items()}
