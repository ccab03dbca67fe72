"""Layers that hold their weights in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptrain.compression.layers import HeldInFewBits

GROUP = 32  # weights of a row that share a step: 4.5 bits each with it
_LARGEST = 7  # of a symmetric number of 4 bits
_ZERO = 8  # what is added so that it is held without a sign


def round_groups(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rounds each 32 weights of a row to whole multiples of their own step, symmetric about 0.

    Source: Dettmers & Zettlemoyer 2023, "The case for 4-bit precision: k-bit Inference Scaling Laws", of small blocks.

    Args:
        weight: Of shape (rows, columns).

    Returns:
        The multiples, two in a byte, uint8, of shape (rows, 16 · groups); the steps, bfloat16, of shape
        (rows, groups); and the number of columns, which the last group may exceed.
    """
    multiples, steps = _multiples(weight.detach().float())
    held = (multiples + _ZERO).to(torch.uint8).flatten(1)
    return held[:, ::2] | held[:, 1::2] << 4, steps, weight.shape[1]


def rounded_to_groups(weight: Tensor) -> Tensor:
    """Returns a matrix as `round_groups` leaves it, in its own dtype and shape."""
    multiples, steps = _multiples(weight.detach().float())
    return (multiples * steps[..., None]).flatten(1)[:, : weight.shape[1]].to(weight.dtype)


def _multiples(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = F.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    least = torch.finfo(torch.float32).tiny * 2**8
    steps = (groups.abs().amax(-1) / _LARGEST).clamp_min(least).to(torch.bfloat16)
    return (groups / steps[..., None].float()).round().clamp(-_LARGEST, _LARGEST), steps


def _unpacked(packed: Tensor, steps: Tensor, columns: int) -> Tensor:
    """Returns the weights, float32, of what `round_groups` returns or of some of its rows."""
    pairs = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    multiples = pairs.unflatten(-1, (-1, GROUP)).float() - _ZERO
    return (multiples * steps[..., None].float()).flatten(-2)[..., :columns]


class Int4Linear(HeldInFewBits):
    """A linear layer with weights in 4 bits; it multiplies in the inputs' precision.

    Args:
        packed: The weights as `round_groups` returns them.
        steps: Their steps.
        columns: The number of inputs.
        bias: Of the outputs; None: none.
    """

    def __init__(self, packed: Tensor, steps: Tensor, columns: int, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = len(packed), columns
        self.register_buffer("packed", packed)
        self.register_buffer("steps", steps)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """The weights as float32, computed anew at each call."""
        packed: Any = self.packed
        steps: Any = self.steps
        return _unpacked(packed, steps, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the outputs, shape (..., outputs), in the dtype of `inputs`, shape (..., inputs)."""
        bias: Any = self.bias
        return F.linear(inputs, self.weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))

    def extra_repr(self) -> str:
        """What `repr` shows of it."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int4Embedding(HeldInFewBits):
    """An embedding with weights in 4 bits.

    Args:
        packed: The weights as `round_groups` returns them.
        steps: Their steps.
        columns: The width of an entry.
        padding_idx: The entry of padding, if any; only noted.
        dtype: Of what it returns: that of the model's other layers.
    """

    def __init__(
        self,
        packed: Tensor,
        steps: Tensor,
        columns: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = len(packed), columns
        self.padding_idx = padding_idx
        self.register_buffer("packed", packed)
        self.register_buffer("steps", steps)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weights as float32, computed anew at each call: for code that asks for them."""
        packed: Any = self.packed
        steps: Any = self.steps
        return _unpacked(packed, steps, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the entries of `ids`, of shape (*ids.shape, width)."""
        packed: Any = self.packed
        steps: Any = self.steps
        like: Any = self.like
        return _unpacked(packed[ids], steps[ids], self.embedding_dim).to(like.dtype)
