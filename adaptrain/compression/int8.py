"""Layers that hold their weights in 8 bits."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptrain.compression.layers import HeldInFewBits

_LARGEST = 127  # of a symmetric signed byte


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of a matrix to whole multiples of its own step, symmetric about 0.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", with a scale per output channel (Krishnamoorthi 2018).

    Args:
        weight: Of shape (rows, columns).

    Returns:
        The multiples, int8, of that shape; and the steps, float32, of shape (rows,): weight ≈ multiples · steps.
    """
    weight = weight.detach().float()
    steps = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * 2**8) / _LARGEST
    return (weight / steps[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), steps


def rounded_to_rows(weight: Tensor) -> Tensor:
    """Returns a matrix as `round_rows` leaves it, in its own dtype and shape."""
    multiples, steps = round_rows(weight)
    return (multiples * steps[:, None]).to(weight.dtype)


class Int8Linear(HeldInFewBits):
    """A linear layer with weights in 8 bits.

    Args:
        multiples: The weights as `round_rows` returns them, shape (outputs, inputs).
        steps: Their steps, shape (outputs,).
        bias: Of the outputs; None: none.
        dynamic: Multiply in integers, with each batch of inputs rounded to 8 bits by its own range (CPU only). False:
            only hold the weights so, and multiply in the inputs' precision.
    """

    def __init__(self, multiples: Tensor, steps: Tensor, bias: Tensor | None, *, dynamic: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = multiples.shape
        self.dynamic = dynamic
        self.register_buffer("multiples", multiples)
        self.register_buffer("steps", steps)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._packed: Any = None  # for the integer kernel; made when first used

    @property
    def weight(self) -> Tensor:
        """The weights as float32, computed anew at each call: for code that asks for them."""
        multiples: Any = self.multiples
        steps: Any = self.steps
        return multiples * steps[:, None]

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the outputs, shape (..., outputs), in the dtype of `inputs`, shape (..., inputs)."""
        bias: Any = self.bias
        if not self.dynamic:
            return F.linear(inputs, self.weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))
        if self._packed is None:
            self._packed = self._pack()
        outputs = torch.ops.quantized.linear_dynamic(inputs.float().contiguous(), self._packed, True)
        return outputs.to(inputs.dtype)

    def _pack(self) -> Any:
        multiples: Any = self.multiples
        steps: Any = self.steps
        zeros = torch.zeros(len(steps), dtype=torch.long)
        with warnings.catch_warnings():
            # Torch is to drop quantized tensors one day; its kernel for the CPU takes weights in no other form yet.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            make: Any = torch._make_per_channel_quantized_tensor  # pyright: ignore[reportPrivateImportUsage]
            weight = make(multiples, steps.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(weight, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        """What `repr` shows of it."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, dynamic={self.dynamic}"


class Int8Embedding(HeldInFewBits):
    """An embedding with weights in 8 bits.

    Args:
        multiples: The weights as `round_rows` returns them, shape (entries, width).
        steps: Their steps, shape (entries,).
        padding_idx: The entry of padding, if any; only noted.
        dtype: Of what it returns: that of the model's other layers.
    """

    def __init__(
        self, multiples: Tensor, steps: Tensor, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = multiples.shape
        self.padding_idx = padding_idx
        self.register_buffer("multiples", multiples)
        self.register_buffer("steps", steps)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weights as float32, computed anew at each call: for code that asks for them."""
        multiples: Any = self.multiples
        steps: Any = self.steps
        return multiples * steps[:, None]

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the entries of `ids`, of shape (*ids.shape, width)."""
        multiples: Any = self.multiples
        steps: Any = self.steps
        like: Any = self.like
        return (multiples[ids] * steps[ids].unsqueeze(-1)).to(like.dtype)
