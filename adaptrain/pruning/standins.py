"""Modules that stand in for those that cannot compute with what is left of them.

Each holds the same parameters under the same names, so that state dicts, optimizers and distributed training see a
module like any other, and the module that it replaced, to be put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptrain.pruning.projections import is_transposed, projection

if TYPE_CHECKING:
    from adaptrain.pruning.family import Attention


class EmptyAttention(nn.Module):
    """An attention module whose heads are all gone: the layer keeps its output bias and the residual around it.

    Its parameters are empty, and computing with them costs nothing.

    Args:
        replaced: The attention module that it stands in for.
        attention: The family's declaration of it.
    """

    def __init__(self, replaced: nn.Module, attention: Attention) -> None:
        super().__init__()
        for name, child in replaced.named_children():
            self.add_module(name, child)
        inside = attention.output.startswith(f"{attention.module}.")
        self._output = attention.output.removeprefix(f"{attention.module}.") if inside else None
        self._replaced = (replaced,)  # in a tuple: kept to be put back, not a submodule

    @property
    def replaced(self) -> nn.Module:
        """The attention module that it stands in for."""
        return self._replaced[0]

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Returns the attention output of no heads, and no attention weights."""
        if past_key_values is not None:
            _pass_by(past_key_values, hidden_states, self.replaced.layer_idx)  # type: ignore[arg-type]
        # Every parameter, and the norm before them, takes part, if only with a gradient that is empty or zero:
        # distributed training waits for each of them.
        out = hidden_states[..., :0]
        output = None if self._output is None else projection(self, self._output)
        if output is not None:
            out = out @ (output.weight if output.transposed else output.weight.T)
            out = out if output.bias is None else out + output.bias
        return out + nothing_of(self.parameters()), None


class EmptyConv1D(nn.Module):
    """The `Conv1D` of transformers without inputs, which it cannot view; only its bias is left.

    Args:
        replaced: The module that it stands in for.
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.nf, self.nx = replaced.nf, replaced.nx
        self.weight, self.bias = replaced.weight, replaced.bias
        self._replaced = (replaced,)

    @property
    def replaced(self) -> nn.Module:
        """The module that it stands in for."""
        return self._replaced[0]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the bias."""
        return x @ self.weight + self.bias  # type: ignore[operator]


class SlicedMultiheadAttention(nn.Module):
    """An `nn.MultiheadAttention` with fewer heads than its width has room for, which torch's own cannot compute.

    Args:
        replaced: The attention that it stands in for.
    """

    _qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer off its fused kernel, which needs every head

    def __init__(self, replaced: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = replaced.in_proj_weight, replaced.in_proj_bias
        self.out_proj = replaced.out_proj
        self.head_dim, self.dropout, self.batch_first = replaced.head_dim, replaced.dropout, replaced.batch_first
        self._replaced = (replaced,)

    @property
    def replaced(self) -> nn.Module:
        """The attention that it stands in for."""
        return self._replaced[0]

    @property
    def num_heads(self) -> int:
        """The heads that are left."""
        return self.in_proj_weight.shape[0] // (3 * self.head_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes as `nn.MultiheadAttention` does; `attn_mask` must be the same for all heads, (target, source)."""
        if query.dim() != 3 or (attn_mask is not None and attn_mask.dim() != 2):
            raise ValueError(
                "Attention whose heads were pruned takes batches of sequences, and an attn_mask of shape (target,"
                f" source); got a query of shape {tuple(query.shape)}"
                + ("." if attn_mask is None else f" and a mask of shape {tuple(attn_mask.shape)}.")
            )
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        heads = []
        for states, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True):
            states = states if self.batch_first else states.transpose(0, 1)
            projected = F.linear(states, weight, bias)
            heads.append(projected.view(*projected.shape[:2], self.num_heads, self.head_dim).transpose(1, 2))
        mask = None if attn_mask is None else _additive(attn_mask, query)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, query)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = heads[0] @ heads[1].transpose(-1, -2) / self.head_dim**0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ heads[2]
            weights = weights.mean(1) if average_attn_weights and self.num_heads else weights
        else:
            attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), weights


class DroppedLayer(nn.Module):
    """A layer that is gone: what it is given is passed on.

    Its parameters are empty. What a model asks of its layers besides, such as their type of attention, the replaced
    one answers.

    Args:
        replaced: The layer that it stands in for.
        shapes: The shapes that its parameters outside of heads and neurons had, by name, to be put back.
        layer_idx: Its place in a cache of keys and values; None where it has none.
    """

    def __init__(self, replaced: nn.Module, shapes: Mapping[str, torch.Size], layer_idx: int | None) -> None:
        super().__init__()
        for name, parameter in replaced.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in replaced.named_children():
            self.add_module(name, child)
        self.shapes, self.layer_idx = dict(shapes), layer_idx
        self._replaced = (replaced,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_replaced" not in self.__dict__:
                raise
            return getattr(self._replaced[0], name)

    @property
    def replaced(self) -> nn.Module:
        """The layer that it stands in for."""
        return self._replaced[0]

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Tensor:
        """Returns what it is given."""
        cache = past_key_values
        if cache is None:
            cache = next((value for value in args if hasattr(value, "get_seq_length")), None)
        if cache is not None:
            _pass_by(cache, hidden_states, self.layer_idx)
        return hidden_states + nothing_of(self.parameters()) if torch.is_grad_enabled() else hidden_states


def _pass_by(cache: Any, hidden_states: Tensor, layer_idx: int | None) -> None:
    """Lets a cache, which counts positions by what its layers were given, count on: one dummy head, one wide."""
    seen = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
    cache.update(seen, seen, layer_idx)


def nothing_of(parameters: Iterable[nn.Parameter]) -> Tensor | float:
    """Returns a zero whose gradient to each of the parameters is zero."""
    if not torch.is_grad_enabled():
        return 0.0
    return torch.cat([parameter.flatten()[:0] for parameter in parameters]).sum()


def stand_in_for_projections(module: nn.Module) -> None:
    """Replaces each `Conv1D` inside of a module that has no inputs left, and puts back those that have again."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not is_transposed(child):
                continue
            empty = child.weight.shape[0] == 0  # type: ignore[union-attr]
            if empty and not isinstance(child, EmptyConv1D):
                setattr(parent, name, EmptyConv1D(child))
            elif not empty and isinstance(child, EmptyConv1D):
                setattr(parent, name, child.replaced)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask that is added to the scores; where it is of booleans, true means left out."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
