"""Where the tensors of a model that shrinks lie in the host's memory."""

from __future__ import annotations

import mmap
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from adaptrain.resources.heap import HEAP_MOST, LEAST_OUTSIDE

_pages: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by the address of their tensor


def move_out(models: Iterable[nn.Module], optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Moves weights and optimizer state on the host out of the heap, each tensor into pages of its own.

    What stays for long, between what comes and goes with each step, keeps freed blocks from joining. In a pruned model
    no two layers are alike, so that little fits what another has left, and the heap grows. Besides, weights that
    Hugging Face loads lie in a private mapping of their file, which stays whole for as long as any tensor in it: what
    is cut off frees nothing.

    Each tensor stays the same object. Those that are there already, share their memory with others, are
    not contiguous or of a class of their own stay where they are, and so does what the system has no pages for. Nothing
    is done where the system is not Linux.

    Args:
        models: The modules whose parameters and buffers move.
        optimizers: The optimizers whose state moves.
    """
    if sys.platform != "linux":
        return
    held = {id(tensor): tensor for model in models for tensor in (*model.parameters(), *model.buffers())}
    for optimizer in optimizers:
        for value in (value for state in optimizer.state.values() for value in state.values()):
            if isinstance(value, Tensor) and LEAST_OUTSIDE <= value.nbytes < HEAP_MOST:
                held[id(value)] = value
    plain = [tensor for tensor in held.values() if _is_plain(tensor)]
    places = Counter(map(_place, plain))
    for tensor in plain:
        if places[_place(tensor)] == 1:
            tensor.data = _moved(tensor.data)


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_shared()
        and tensor.data_ptr() not in _pages
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    )


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _moved(tensor: Tensor) -> Tensor:
    """Returns a copy, in pages of its own unless it is small; the tensor itself where the system has none to give."""
    if tensor.nbytes < LEAST_OUTSIDE:
        return tensor.clone()
    try:
        pages = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return tensor
    moved = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
    _pages[moved.data_ptr()] = pages
    return moved
