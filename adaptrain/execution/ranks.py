"""What the ranks of a data-parallel run settle with each other during a step: the vote, and the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 25 * 2**20  # as in torch's DistributedDataParallel


class Ranks:
    """The ranks of a run. In a single process everything returns at once.

    No collective runs while micro-batches run, so that a rank that runs out of memory does not leave the others
    waiting: all vote when they are done, and gradients are reduced only after a unanimous yes.

    Args:
        device: The rank's device (NCCL reduces there).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def maxima(self, values: Sequence[float]) -> list[float]:
        """Returns the element-wise maximum over the ranks of a few numbers."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Returns the element-wise sum over the ranks of a few numbers."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op)
        return tensor.tolist()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the ranks, in buckets.

        A parameter that some ranks did not use counts zero there; one that no rank used keeps no gradient.

        Args:
            parameters: The module's parameters, in the same order on every rank.
        """
        if self.count == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        used = self.maxima([float(parameter.grad is not None) for parameter in trained])
        gradients = []
        for parameter, is_used in zip(trained, used, strict=True):
            if is_used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self.count
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    filled: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        bucket, used = filled.get(kind, ([], 0))
        if not bucket or used + tensor.nbytes > _BUCKET_BYTES:
            bucket, used = [], 0
            buckets.append(bucket)
        bucket.append(tensor)
        filled[kind] = bucket, used + tensor.nbytes
    return buckets
