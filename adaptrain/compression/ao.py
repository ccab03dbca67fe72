"""Lower precision by torchao, which is imported only when one of its methods is asked for.

Source: torchao's quantization API, https://docs.pytorch.org/ao/stable/.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adaptrain.compression.layers import roundable
from adaptrain.errors import ConfigurationError

AO_METHODS = ("torchao_int8_dynamic", "torchao_int8_weight")


def check_installed(method: str) -> None:
    """Refuses a method of torchao where that is not installed.

    Raises:
        ConfigurationError: It is not.
    """
    if method in AO_METHODS and importlib.util.find_spec("torchao") is None:
        raise ConfigurationError(f"method={method!r} needs torchao: pip install 'adaptrain[torchao]'.")


def round_linear(model: nn.Module, method: str) -> nn.Module:
    """Lets torchao hold the weights of a model's linear layers in 8 bits, in place.

    Embeddings stay, and so do layers whose weight is shared with one, and GPT-2's `Conv1D`.

    Args:
        model: The model.
        method: One of `AO_METHODS`: 8-bit weights with integer arithmetic and inputs rounded by row, or with arithmetic
            as before.

    Returns:
        The model.

    Raises:
        ConfigurationError: torchao is not installed, or the model has no such layers.
    """
    check_installed(method)
    from torchao import quantization as torchao  # pyright: ignore[reportMissingImports]

    found = [module for _, _, module in roundable(model)]
    embedded = {id(module.weight) for module in found if isinstance(module, nn.Embedding)}
    linear = {id(m): m for m in found if type(m) is nn.Linear and id(m.weight) not in embedded}
    if not linear:
        raise ConfigurationError(f"torchao rounds linear layers, and {type(model).__name__} has none of its own.")
    is_dynamic = method == "torchao_int8_dynamic"
    config = torchao.Int8DynamicActivationInt8WeightConfig() if is_dynamic else torchao.Int8WeightOnlyConfig()
    torchao.quantize_(model, config, filter_fn=lambda module, _: id(module) in linear)
    for module in linear.values():
        module.__dict__.pop("extra_repr", None)  # torchao's, which cannot be pickled
    return model.requires_grad_(False)


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights and buffers of a model by name, shared ones once, and what torchao's are made of."""
    state: dict[str, Any] = model.state_dict()
    found: dict[tuple[int, int], tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        made_of = {name: tensor}
        if is_traceable_wrapper_subclass(tensor):
            made_of = {f"{name}.{part}": getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
        for part, plain in made_of.items():
            found.setdefault((plain.data_ptr(), plain.numel()), (part, plain))
    return dict(found.values())


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the weights of a model that torchao rounded, in safetensors."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in plain_tensors(model).items()}
    save_file(tensors, str(path), metadata={"format": "pt"})


@torch.no_grad()
def load_weights(model: nn.Module, path: Path) -> None:
    """Reads them into a model of the same structure that torchao rounded as well.

    Raises:
        ConfigurationError: They are of another structure, or of another torchao.
    """
    from safetensors.torch import load_file

    saved, held = load_file(str(path)), plain_tensors(model)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in held.items()}:
        import torchao  # pyright: ignore[reportMissingImports]

        raise ConfigurationError(
            f"{path} does not hold what torchao {torchao.__version__} makes of this model: load it with the torchao"
            " that wrote it."
        )
    for name, tensor in held.items():
        tensor.copy_(saved[name])
