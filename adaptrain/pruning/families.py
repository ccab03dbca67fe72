"""Which models can be pruned, declared: where each family keeps its heads and its feed-forward neurons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import cost
from adaptrain.pruning.checks import check

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
    matches=_of_type("llama", "mistral", "qwen2", "qwen3"),
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

GPT2 = Family(
    name="gpt2",
    matches=_of_type("gpt2"),
    layers="h",
    attention=Attention(
        module="attn",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        head_size="head_dim",
        counts=("num_heads",),
        widths=("split_size",),
    ),
    ffn=FeedForward(inputs=("mlp.c_fc",), output="mlp.c_proj"),
    config=ConfigFields(layers="n_layer", ffn="n_inner"),
)

MODERNBERT = Family(
    name="modernbert",
    matches=_of_type("modernbert"),
    layers="layers",
    attention=Attention(
        module="attn",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        output="attn.Wo",
        head_size="head_dim",
        counts=("num_heads",),
        widths=("all_head_size",),
    ),
    ffn=FeedForward(inputs=("mlp.Wi", "mlp.Wi"), output="mlp.Wo"),
    config=ConfigFields(layers="num_hidden_layers", ffn="intermediate_size"),
)

_T5_HEADS = (
    "all layers of a T5 stack add the position bias that its first layer makes, one for each head, so that none can"
    " have fewer heads than another"
)
_T5_LAYERS = "the first layer of a T5 stack makes the position bias of all others, and layers hand it on"
_T5: dict[str, Any] = {
    "layers": ("encoder.block", "decoder.block"),
    "attention": None,
    "kept": {"heads": _T5_HEADS, "layers": _T5_LAYERS},
}


def _t5(*, gated: bool) -> Callable[[nn.Module], bool]:
    is_t5 = _of_type("t5", "mt5")
    return lambda module: is_t5(module) and module.config.is_gated_act is gated  # type: ignore[union-attr]


T5 = Family(
    name="t5",
    matches=_t5(gated=False),
    ffn=FeedForward(inputs=("layer.-1.DenseReluDense.wi",), output="layer.-1.DenseReluDense.wo"),
    **_T5,
)

T5_GATED = Family(
    name="t5-gated",
    matches=_t5(gated=True),
    ffn=FeedForward(
        inputs=("layer.-1.DenseReluDense.wi_0", "layer.-1.DenseReluDense.wi_1"), output="layer.-1.DenseReluDense.wo"
    ),
    **_T5,
)

_FAMILIES: list[Family] = [BERT, DISTILBERT, LLAMA, GPT2, MODERNBERT, T5, T5_GATED]
_SUPPORTED = (
    "BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, ModernBERT, GPT-2, Llama, Mistral, Qwen2 and Qwen3 of"
    " Hugging Face, and T5 without its heads"
)
_REFUSED = {"albert": "its layers share one set of parameters, so that none of them can be given a width of its own"}


def register_family(family: Family) -> None:
    """Makes another architecture prunable; a family registered later is asked first.

    Declare where a layer's heads (`Attention`) and neurons (`FeedForward`) are, as paths; see there how a projection
    that is fused is named. Leave out (None) what cannot be pruned. A model that is not Hugging Face's also needs its
    own `matches`, `backbone` (often `lambda model: model`), `dense_twin` (builds the model anew) and `example_inputs`.
    Register it before `fit` and before loading a checkpoint. `examples/prune_your_own_model.py` does all of it for an
    `nn.TransformerEncoder`.

    Heads can be pruned where the attention module takes their number from its projections' shapes or from attributes
    (`counts`, `widths`), or is an `nn.MultiheadAttention`. That a family is right shows when a pruned model computes
    what the dense one does with the same units' output columns at zero.

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
    averages: list[str] = []
    for path, candidate in module.named_modules():
        inside = any(path.startswith(f"{outer}." if outer else "") for outer in found)
        if "_orig_mod" in candidate._modules:
            continue  # torch.compile's wrapper, which answers for the model inside of it
        if isinstance(candidate, AveragedModel) and candidate is not module:
            averages.append(path)
        if any(path.startswith(f"{average}.") for average in averages):
            continue  # it follows the model that it is an average of
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
            check(match)
            return match
    why = _REFUSED.get(getattr(getattr(model, "config", None), "model_type", ""), "no family is declared for it")
    raise ConfigurationError(
        f"{type(model).__name__} cannot be pruned: {why}. Supported: {_SUPPORTED};"
        " declare another with adaptrain.pruning.families.register_family."
    )


def _is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, told without importing it."""
    return hasattr(module, "base_model_prefix") and hasattr(getattr(module, "config", None), "model_type")
