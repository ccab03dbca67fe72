"""What a model costs: parameters, FLOPs, bytes on disk, and measured latency."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import statistics
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from adaptrain.errors import ConfigurationError
from adaptrain.pruning.hollow import is_hollow
from adaptrain.resources.clock import timed
from adaptrain.resources.heap import LEAST_OUTSIDE, blocks_outside_of_heap

COPIES = 5  # of a model: where one lies in memory is worth 2 to 5%, so that their mean is known to 1 or 2%


def count_params(model: nn.Module) -> int:
    """Returns the number of parameters; a parameter that is tied counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Returns the floating point operations of one forward pass, a multiply-add counted as two.

    Counted while the pass runs, with attention as plain matrix products: the fused CPU kernel of
    `scaled_dot_product_attention` is unknown to torch's counter and would count as nothing.

    Args:
        model: The model, called as `model(**inputs)`.
        inputs: Its inputs, on its device.
    """
    with evaluating(model), _unfused(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return int(counter.get_total_flops())


def size_on_disk_bytes(model: nn.Module) -> int:
    """Returns the bytes of the model's state dict as `torch.save` writes it; hollow matrices count as if full."""
    sink, state = _ByteCounter(), model.state_dict()
    torch.save(state, sink)  # pyright: ignore[reportArgumentType]
    empty = {value.untyped_storage().data_ptr(): value for value in state.values() if is_hollow(value)}
    return sink.written + sum(value.nbytes - value.untyped_storage().nbytes() for value in empty.values())


def measure_latency(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], *, repeats: int | None = None, copies: int = 0
) -> dict[str, float]:
    """Measures the forward pass of several models against each other.

    The models take turns, in an order that rotates, so that a machine that is busy for a while slows all of them and
    not one. Waiting for a core does not count (`timed`). Other interruptions only ever add time, so the median is over
    the faster half of each model's turns.

    Where a model's weights lie in memory changes its time on a CPU by several percent for as long as it lives, and
    says nothing about where they will lie in another process: `copies` averages over that.

    Args:
        models: The models by name, all on the device of `inputs`, each called as `model(**inputs)` in evaluation
            mode and without gradients. Their training mode is put back afterwards.
        inputs: The inputs they share.
        repeats: Timed forwards of each model, at least 1; with copies at least two of each. None: as many as
            `repeats_for` says for the slowest model, by one forward of each.
        copies: Over how many of each model they are spread. On a CPU these are deep copies, one set of them after the
            other, but for weights that all models share; elsewhere the models themselves, since where they lie makes
            no difference there. 0: the models themselves.

    Returns:
        Milliseconds by name, the mean over copies.
    """
    device = next((tensor.device for tensor in inputs.values()), torch.device("cpu"))
    if repeats is None:
        repeats = repeats_for(max(_in_turns(models, inputs, device, 1).values()))
    shared = _shared(list(models.values()))
    turns, copied = max(2, repeats // copies) if copies else repeats, copies > 0 and device.type == "cpu"
    found = []
    for _ in range(max(1, copies)):
        # No name for the copies, which would hold them while the next are made. Copying is enough of a warm-up.
        found.append(
            _in_turns(_copied(models, shared) if copied else models, inputs, device, turns, warm_up=not copied)
        )
    return {name: statistics.fmean(each[name] for each in found) for name in models}


def _copied(models: Mapping[str, nn.Module], shared: Mapping[int, Any]) -> dict[str, nn.Module]:
    """Returns deep copies, which share what `shared` holds by identity, and which go back when they are freed."""
    with blocks_outside_of_heap(LEAST_OUTSIDE):
        return copy.deepcopy(dict(models), dict(shared))


def _shared(models: Sequence[nn.Module]) -> dict[int, Any]:
    """Returns the parameters by identity that are part of each of several models."""
    if len(models) < 2:
        return {}
    held = [{id(parameter): parameter for parameter in model.parameters()} for model in models]
    return {key: parameter for key, parameter in held[0].items() if all(key in other for other in held[1:])}


def _in_turns(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    device: torch.device,
    repeats: int,
    *,
    warm_up: bool = True,
) -> dict[str, float]:
    """Returns milliseconds by name; `warm_up`: after a forward of each for caches, allocator and kernel selection."""
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        gc.disable()
        stack.callback(gc.enable if collecting else gc.disable)
        for name in names if warm_up else ():
            models[name](**inputs)
        for turn in range(repeats):
            for position in range(len(names)):
                name = names[(turn + position) % len(names)]
                times[name].append(1e3 * timed(partial(models[name], **inputs), device)[1])
    return {name: statistics.median(sorted(own)[: (len(own) + 1) // 2]) for name, own in times.items()}


def repeats_for(latency_ms: float) -> int:
    """Returns how often to time a forward pass: about half a second's worth, from 8 to 100 times."""
    return round(min(100.0, max(8.0, 500.0 / max(latency_ms, 1e-3))))


def peak_activation_bytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Returns the most bytes that tensors made by one forward pass occupy at once, as seen by torch's operators.

    What a kernel uses inside, and the allocator's rounding, are not seen.

    Args:
        model: The model, called as `model(**inputs)`.
        inputs: Its inputs, on its device.
    """
    known = (*model.parameters(), *model.buffers(), *inputs.values())
    with evaluating(model), _unfused(), _LiveBytes({tensor.untyped_storage().data_ptr() for tensor in known}) as live:
        model(**inputs)
    return live.peak


def example_inputs(
    model: Any, batch_size: int, sequence_length: int, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Returns token inputs of one shape for a Hugging Face text model; the same at every call.

    Args:
        model: The model; its `config` says how many tokens and positions there are.
        batch_size: Samples.
        sequence_length: Tokens of each sample, none of them padding.
        device: Where they lie; None: the model's device.

    Returns:
        `input_ids` and `attention_mask`, both int64 of shape (batch_size, sequence_length); for a model with a decoder
        of its own also `decoder_input_ids`, of the same shape.

    Raises:
        ConfigurationError: The model has fewer positions than `sequence_length`.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    padding = getattr(model.config, "pad_token_id", None)
    if (
        positions is not None
        and padding is not None
        and model.config.model_type in ("roberta", "xlm-roberta", "camembert")
    ):
        positions -= padding + 1  # these count positions from behind the padding token
    if positions is not None and sequence_length > positions:
        raise ConfigurationError(
            f"{type(model).__name__} reads at most {positions} tokens, but {sequence_length} were asked for."
            " Set latency_input=(batch, sequence) to a shape that the model can read."
        )
    device = next(model.parameters()).device if device is None else device
    shape = (batch_size, sequence_length)
    # Never the padding token: where it stands, there is no position.
    ids = torch.arange(batch_size * sequence_length, device=device) % (model.config.vocab_size - 1)
    if padding is not None:
        ids = ids + (ids >= padding)
    inputs = {"input_ids": ids.view(shape), "attention_mask": torch.ones(shape, dtype=torch.long, device=device)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule's own training flag is put back."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Layers of `nn.TransformerEncoder` operator by operator: fused into one, nothing is seen of what they do."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators make, for as long as they live.

    Args:
        known: Addresses of the storages that were there before.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen and storage.data_ptr() not in self.known:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


class _ByteCounter:
    """A file that only counts what is written to it."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, data: Any) -> int:
        self.written += len(data)
        return len(data)

    def flush(self) -> None:
        pass
