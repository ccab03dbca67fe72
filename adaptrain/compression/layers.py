"""Which layers of a model can hold their weights in few bits, and putting others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from adaptrain.pruning.projections import is_transposed


class HeldInFewBits(nn.Module):
    """A layer whose buffers keep their dtypes, wherever it is moved: steps in fewer bits would round once more.

    `model.to(torch.bfloat16)` changes only what an embedding returns, by its empty buffer `like`.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {name: tensor for name, tensor in self.named_buffers(recurse=False) if name != "like"}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            if (moved := self._buffers[name]) is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


def roundable(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yields the linear layers (also GPT-2's `Conv1D`) and embeddings of a model, each with its parent and its name.

    Subclasses are left out, since they may compute something else; so are layers of which pruning left nothing.
    """
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Embedding:
                held = module.max_norm is None  # which would change the weights while they are read
            else:
                held = type(module) is nn.Linear or is_transposed(module)
            if held and module.weight.numel():  # type: ignore[union-attr,operator]
                yield parent, name, module


def convert(
    model: nn.Module,
    round_weight: Callable[[Tensor], tuple[Any, ...]],
    linear: Callable[..., nn.Module],
    embedding: Callable[..., nn.Module],
) -> nn.Module:
    """Replaces a model's linear layers and embeddings, in place; the rest stays as it is.

    Weights that are shared, as an output layer's with an embedding, are rounded and held once.

    Args:
        model: The model.
        round_weight: Returns what is held of a matrix of shape (outputs, inputs), or (entries, width).
        linear: Makes a layer of that and a bias, or None.
        embedding: Makes a layer of that, the entry of padding or None, and the dtype of what it is to return.

    Returns:
        The model.
    """
    rounded: dict[int, tuple[Any, ...]] = {}
    for parent, name, module in roundable(model):
        weight: Any = module.weight
        if weight.data_ptr() not in rounded:
            rounded[weight.data_ptr()] = round_weight(weight.T if is_transposed(module) else weight)
        held = rounded[weight.data_ptr()]
        if isinstance(module, nn.Embedding):
            setattr(parent, name, embedding(*held, module.padding_idx, weight.dtype))
        else:
            setattr(parent, name, linear(*held, module.bias))
    return model
