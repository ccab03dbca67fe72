"""Recognising an out-of-memory error, whatever raised it, and giving memory back after one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from adaptrain.execution.split import BatchLayout
from adaptrain.resources.heap import release_free_heap
from adaptrain.resources.host import memory_available_bytes

# Substrings of messages, lower case. Only texts that mean "no memory": a plain cuBLAS failure is not one.
_MESSAGES = (
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",  # errno 12
    "not enough memory: you tried to allocate",  # torch's CPU allocator on Windows
    "could not create a primitive",  # oneDNN, for a scratchpad that it cannot allocate as for a layout it lacks
    "could not create a memory object",
    "std::bad_alloc",
    "bad allocation",
    "cuda out of memory",
    "cuda error: out of memory",
    "cuda_error_out_of_memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "hip out of memory",
    "hip error: out of memory",
    "hipblas_status_alloc_failed",
    "rocblas_status_memory_error",
    "mps backend out of memory",
    "xpu out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device.

    Recognised: `torch.OutOfMemoryError`, Python's `MemoryError`, and the runtime errors of torch's CPU allocator,
    CUDA, cuBLAS, cuDNN, HIP, MPS and XPU, by their messages.

    Args:
        error: What was raised.

    Returns:
        True for an out-of-memory error.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, (RuntimeError, OSError)):
        return False
    message = str(error).lower()
    return any(text in message for text in _MESSAGES)


def attempt(run: Callable[[], Any], *, host_bytes: int = 0) -> tuple[Any, str | None]:
    """Runs something that may run out of memory, and releases what it took where it did. Any other error is raised.

    Args:
        run: What to run.
        host_bytes: What it takes of the host's memory at least. Where that much is not free it is not run: the system
            might end the process, and raise nothing.

    Returns:
        What it returned, and None; or None, and the first line of the out-of-memory error. Not the error itself: it
        pins the tensors of the frames it passed.
    """
    if host_bytes and host_bytes > (free := memory_available_bytes()):
        return None, f"it takes {host_bytes / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free"
    try:
        return run(), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        lack = str(error).strip().split("\n")[0] or type(error).__name__
    release_memory()
    return None, lack


def weights_on_host(model: nn.Module) -> int:
    """Returns the bytes of a model's weights; 0 where they lie on a device with memory of its own."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.device.type == "cpu")


def release_memory() -> None:
    """Gives memory back to the device and to the system. Call it outside of any `except` block.

    An exception's traceback keeps the frames of the failed step alive, and with them its tensors.
    """
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
    release_free_heap()  # under an address-space limit its free blocks are missing elsewhere


class DoesNotFitError(RuntimeError):
    """A single sample, or a batch that cannot be split, does not fit into the memory there is."""


def does_not_fit(
    layout: BatchLayout | None, can_split: bool, report: str, message: str | None, *, stage: str | None = None
) -> str:
    """Returns the text of a `DoesNotFitError`.

    Args:
        layout: The layout of what did not fit, where there is one.
        can_split: Whether it was a single sample; else it is a batch that cannot be split.
        report: A description of memory.
        message: The error's first line; None where another rank ran out.
        stage: The stage of evaluation; None in training.
    """
    what = "A single sample" if can_split else "A batch that cannot be split into samples"
    length = f" ({layout.length} columns)" if layout is not None and layout.length > 1 else ""
    training = " gradient checkpointing, an optimizer with less state," if stage is None else ""
    return (
        f"{what}{length} does not fit into memory{'' if stage is None else f' in {stage}'}. {report} The error was:"
        f" {message or 'on another rank'}\nWhat to try: shorter sequences or smaller inputs, a lower precision,"
        f"{training} a smaller model, or a higher memory_limit_gib where that is what limits."
    )
