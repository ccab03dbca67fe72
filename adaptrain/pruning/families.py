"""Which models can be pruned, declared: where each family keeps its heads and its feed-forward neurons."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import cost

KINDS = ("heads", "ffn")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Where a layer keeps its attention heads. Paths start at the layer.

    The unit that is pruned is a key-value head together with the query heads that read it; without grouped queries
    that is one head.

    Args:
        module: The module that splits the heads, called with the hidden states first, that returns a tuple whose
            first element is the attention output.
        query: The query projection, an `nn.Linear` whose rows are ordered by key-value head.
        key: The key projection.
        value: The value projection.
        output: The projection of the concatenated heads, inside of `module` or after it.
        head_size: The attribute of `module` that holds the width of one head.
        counts: Attributes of `module` that hold the number of query heads.
        widths: Attributes of `module` that hold the number of query heads times the width of one.
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
    """Where a layer keeps its feed-forward neurons. Paths start at the layer.

    Args:
        inputs: The projections whose rows are the neurons: one, or gate and up.
        output: The projection whose columns are the neurons.
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
        layers: The path from the backbone to the `nn.ModuleList` of its layers.
        attention: Where the heads are; None where they cannot be pruned.
        ffn: Where the feed-forward neurons are; None where they cannot be pruned.
        backbone: Returns the module that `layers` starts from.
        dense_twin: Builds a dense model like the one given, any weights, for measuring.
        example_inputs: Builds inputs `(model, batch_size, sequence_length) -> dict`, for measuring.
        config: Where the Hugging Face config holds the shape, for exports that need nothing but transformers; None
            where there is no such config.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    layers: str
    attention: Attention | None
    ffn: FeedForward | None
    backbone: Callable[[Any], nn.Module] = field(default=lambda model: model.base_model)
    dense_twin: Callable[[Any], nn.Module] = field(default=lambda model: type(model)(copy.deepcopy(model.config)))
    example_inputs: Callable[[Any, int, int], dict[str, Tensor]] = cost.example_inputs
    config: ConfigFields | None = None


def _of_type(*model_types: str) -> Callable[[nn.Module], bool]:
    return lambda module: _is_hugging_face(module) and module.config.model_type in model_types  # type: ignore[union-attr]


BERT = Family(
    name="bert",
    matches=_of_type("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    layers="encoder.layer",
    attention=Attention(
        module="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        head_size="attention_head_size",
        counts=("num_attention_heads",),
        widths=("all_head_size",),
    ),
    ffn=FeedForward(inputs=("intermediate.dense",), output="output.dense"),
    config=ConfigFields(layers="num_hidden_layers", ffn="intermediate_size"),
)

DISTILBERT = Family(
    name="distilbert",
    matches=_of_type("distilbert"),
    layers="transformer.layer",
    attention=Attention(
        module="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        head_size="attention_head_size",
        counts=("n_heads",),
        widths=("dim",),
    ),
    ffn=FeedForward(inputs=("ffn.lin1",), output="ffn.lin2"),
    config=ConfigFields(layers="n_layers", ffn="hidden_dim"),
)

LLAMA = Family(
    name="llama",
    matches=_of_type("llama", "mistral", "qwen2"),
    layers="layers",
    attention=Attention(
        module="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        head_size="head_dim",
    ),
    ffn=FeedForward(inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj"),
    config=ConfigFields(
        layers="num_hidden_layers",
        ffn="intermediate_size",
        query_heads="num_attention_heads",
        key_value_heads="num_key_value_heads",
        head_size="head_dim",
    ),
)

_FAMILIES: list[Family] = [BERT, DISTILBERT, LLAMA]
_SUPPORTED = "BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, Llama, Mistral and Qwen2 of Hugging Face"


def register_family(family: Family) -> None:
    """Makes another architecture prunable; a family registered later is asked first.

    A plain model needs its own `matches`, `backbone` (often `lambda model: model`), `dense_twin` (often
    `copy.deepcopy` of a model built fresh) and `example_inputs`.

    Args:
        family: The declaration. One of the same name is replaced.
    """
    _FAMILIES[:] = [family, *(other for other in _FAMILIES if other.name != family.name)]


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
    def layers(self) -> nn.ModuleList:
        """The model's layers."""
        return self.family.backbone(self.model).get_submodule(self.family.layers)  # type: ignore[return-value]

    def dense_twin(self) -> nn.Module:
        """Returns a new dense model of the same class, dtype and device, for measuring; its weights are random.

        The random state of the process is left as it was.
        """
        parameter = next(self.model.parameters())
        devices = [parameter.device] if parameter.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            twin = self.family.dense_twin(self.model)
        return twin.to(device=parameter.device, dtype=parameter.dtype)

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Tensor]:
        """Returns inputs of one shape on the model's device."""
        inputs = self.family.example_inputs(self.model, batch_size, sequence_length)
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def find_family(module: nn.Module) -> Match:
    """Finds the model to prune: `module` itself or the outermost model inside of it.

    Args:
        module: A model, or a module that holds one, as a LightningModule does.

    Returns:
        The model and its family.

    Raises:
        ConfigurationError: There is none, or more than one, or it is of an architecture that cannot be pruned; the
            message names the class.
    """
    found: dict[str, nn.Module] = {}
    for path, candidate in module.named_modules():
        inside = any(path.startswith(f"{outer}." if outer else "") for outer in found)
        if "_orig_mod" in candidate._modules:
            continue  # torch.compile's wrapper, which answers for the model inside of it
        if not inside and (_is_hugging_face(candidate) or any(family.matches(candidate) for family in _FAMILIES)):
            found[path] = candidate
    if len(found) != 1:
        seen = ", ".join(f"{type(model).__name__} at '{path}'" for path, model in found.items()) or "none"
        raise ConfigurationError(
            f"Pruning needs exactly one model in {type(module).__name__}, found {seen}. Supported: {_SUPPORTED};"
            " declare another with adaptrain.pruning.families.register_family."
        )
    model = next(iter(found.values()))
    for family in _FAMILIES:
        if family.matches(model):
            match = Match(model, family)
            _check(match)
            return match
    raise ConfigurationError(
        f"{type(model).__name__} cannot be pruned: no family is declared for it. Supported: {_SUPPORTED};"
        " declare another with adaptrain.pruning.families.register_family."
    )


def _is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, told without importing it."""
    return hasattr(module, "base_model_prefix") and hasattr(getattr(module, "config", None), "model_type")


def _check(match: Match) -> None:
    """Refuses a model whose projections are not the plain linear layers that can be sliced."""
    name = type(match.model).__name__
    if getattr(getattr(match.model, "config", None), "add_cross_attention", False):
        raise ConfigurationError(f"{name} cannot be pruned with add_cross_attention=True: its cross-attention is kept.")
    names: dict[int, list[str]] = {}
    for path, parameter in match.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(path)
    for index, layer in enumerate(match.layers):
        for path in projections(match.family):
            linear = layer.get_submodule(path)
            if type(linear) is not nn.Linear:
                raise ConfigurationError(
                    f"{name} cannot be pruned: '{path}' of layer {index} is a {type(linear).__name__}, and only a plain"
                    " nn.Linear can be sliced. Prune before adding adapters or quantizing, or leave pruning out."
                )
            shared = [other for parameter in linear.parameters() for other in names[id(parameter)][1:]]
            if shared:
                raise ConfigurationError(
                    f"{name} cannot be pruned: '{path}' of layer {index} is shared with {', '.join(shared)}, which"
                    " would shrink with it."
                )


def projections(family: Family) -> tuple[str, ...]:
    """Returns the paths, from a layer, of every linear projection that pruning slices."""
    paths: tuple[str, ...] = ()
    if family.attention is not None:
        paths += (family.attention.query, family.attention.key, family.attention.value, family.attention.output)
    if family.ffn is not None:
        paths += (*family.ffn.inputs, family.ffn.output)
    return paths
