"""Which models can be pruned, declared: where each family keeps its heads and its feed-forward neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from adaptrain.errors import ConfigurationError
from adaptrain.pruning.checks import check
from adaptrain.pruning.family import KINDS as KINDS
from adaptrain.pruning.family import Attention as Attention
from adaptrain.pruning.family import ConfigFields
from adaptrain.pruning.family import Family as Family
from adaptrain.pruning.family import FeedForward as FeedForward
from adaptrain.pruning.family import Match as Match


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
_NAME = "adaptrain_model"  # the attribute of a module that says which of several models is meant
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


def find_family(module: nn.Module) -> Match:
    """Finds the model to prune: `module` itself or the outermost model inside of it.

    Args:
        module: A model, or a module that holds one, as a LightningModule does. One that holds several, such as a
            student and its teacher, says which is meant by an attribute: `adaptrain_model = "student"`.

    Returns:
        The model and its family.

    Raises:
        ConfigurationError: There is none, or more than one, or it is of an architecture that cannot be pruned; the
            message names the class.
    """
    module = _named(module)
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
            f"Pruning needs exactly one model in {type(module).__name__}, found {seen}."
            + (f" Say in the module which one is meant: {_NAME} = {next(iter(found))!r}." if found else "")
            + f" Supported: {_SUPPORTED}; declare another with adaptrain.pruning.families.register_family."
        )
    model = next(iter(found.values()))
    if hasattr(model, "get_base_model"):
        raise ConfigurationError(
            f"{type(model).__name__} is peft's wrapper, whose adapters would not follow a structure that changes. Give"
            " the plain model, merged: model.merge_and_unload(). adaptrain.LowRankAdapters puts adapters into it."
        )
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


def _named(module: nn.Module) -> nn.Module:
    """Returns the part of a module that its `adaptrain_model` names; all of it where it names none."""
    path = getattr(module, _NAME, None)
    if path is None:
        return module
    try:
        return module.get_submodule(path)
    except (AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"{_NAME} must be the path of a model in {type(module).__name__}, such as 'student', got {path!r}."
        ) from error


def _is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, told without importing it."""
    return hasattr(module, "base_model_prefix") and hasattr(getattr(module, "config", None), "model_type")
