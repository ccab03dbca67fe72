"""Low-rank adapters in a model, through peft: put in, taken out, merged; and what another rank would be worth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.errors import ConfigurationError

CHECKPOINT_KEY = "adaptrain_adapters"
_NAME = "default"  # of the adapter, as peft calls it


def adapted_matrices(match: Any) -> dict[str, nn.Module]:
    """Returns the linear layers that may get adapters, by their name in the model: those inside of its layers."""
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for layer in match.layers for module in layer.modules()}
    return {
        name: module
        for name, module in match.model.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
    }


def head_parameters(match: Any) -> list[nn.Parameter]:
    """Returns what trains whole beside adapters: what was registered after the layers, but embeddings and their ties.

    Those are a pooler, a classifier and the last norm; a language model's output matrix is not among them.
    """
    model = match.model
    layers = {id(p) for layer in match.layers for p in layer.parameters()}
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings |= {id(p) for p in output.parameters()} if output is not None else set()
    parameters = list(model.parameters())
    last = max(place for place, p in enumerate(parameters) if id(p) in layers)
    return [p for p in parameters[last + 1 :] if id(p) not in layers | embeddings]


def rank_cost(matrix: nn.Module) -> int:
    """Returns the parameters of one rank: the inputs and the outputs of a matrix."""
    weight = matrix.weight
    assert isinstance(weight, Tensor)
    return sum(weight.shape)


def insert_adapters(match: Any, ranks: Mapping[str, int], *, scale: float) -> None:
    """Puts adapters into a model, in place, and freezes all but them and its head.

    The output of a matrix W becomes W·x + scale·B·A·x, with B zero at first (Hu et al. 2021, arXiv:2106.09685).

    Args:
        match: The model and its layers.
        ranks: The rank for each matrix, by its name in the model; 0: no adapter.
        scale: alpha/r, the same for all, so that a larger rank is not a smaller step.
    """
    peft = import_peft()
    from transformers.pytorch_utils import Conv1D

    head = head_parameters(match)
    chosen = {name: rank for name, rank in ranks.items() if rank}
    modules = dict(match.model.named_modules())
    for parameter in match.model.parameters():
        parameter.requires_grad_(False)
    if chosen:
        # peft reads the names in its patterns as regular expressions.
        exact = {f"^{re.escape(name)}": rank for name, rank in chosen.items()}
        config = peft.LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules=list(chosen),
            rank_pattern=exact,
            alpha_pattern={name: scale * rank for name, rank in exact.items()},
            fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in chosen),
        )
        peft.inject_adapter_in_model(config, match.model, adapter_name=_NAME)
    for parameter in head:
        parameter.requires_grad_(True)


def merge_adapters(model: nn.Module, *, keep: bool = True) -> int:
    """Takes all adapters out, in place, so that the model is a plain one again, and lets all parameters train.

    Args:
        model: A model, or a module that holds it.
        keep: Add what they learned to the weights; else it is dropped.

    Returns:
        How many there were.
    """
    layers = adapters_in(model)
    for path, layer in layers:
        if keep:
            layer.merge(safe_merge=True)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.get_base_layer())
    if layers:
        for module in model.modules():
            module.__dict__.pop("peft_config", None)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    return len(layers)


def adapters_in(model: nn.Module) -> list[tuple[str, Any]]:
    """Returns the layers with adapters, by their name."""
    # Told by what peft adds to them, so that peft is imported only where it is used.
    return [(name, each) for name, each in model.named_modules() if hasattr(each, "lora_A")]


def replay_adapters(module: nn.Module, saved: Mapping[str, Any] | None) -> None:
    """Gives a module's model the adapters that a checkpoint's weights have; what its own had learned is lost.

    Args:
        module: A module that holds the model, or the model.
        saved: What a checkpoint holds at `CHECKPOINT_KEY`, or None.
    """
    from adaptrain.pruning.families import find_family

    if saved is None and not adapters_in(module):
        return
    merge_adapters(module, keep=False)
    if saved is not None:
        insert_adapters(find_family(module), saved["ranks"], scale=saved["scale"])


def rank_gains(gradient: Tensor, most: int) -> list[float]:
    """Returns what each further rank of an adapter could change the loss by, to first order.

    A step of a rank-r adapter moves its matrix along a matrix of rank r. The best of them follows the largest singular
    vectors of the gradient G, along which the squared singular values σ₁² ≥ σ₂² ≥ ... are its share of ‖G‖² (the
    argument of LoRA-GA, Wang et al. 2024, arXiv:2407.05000, for how to begin).

    Args:
        gradient: G, of two dimensions.
        most: Ranks to tell the gains of.
    """
    matrix = gradient.detach().float()
    most = min(most, *matrix.shape)
    if min(matrix.shape) > 4 * most + 64:  # all of them would take minutes in large models
        values = torch.svd_lowrank(matrix, q=most + 8, niter=4)[1]
    else:
        values = torch.linalg.svdvals(matrix)
    return values[:most].square().tolist()


def import_peft() -> Any:
    """Returns peft.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError("Low-rank adapters need peft: pip install 'adaptrain[adapters]'.") from error
    return peft
