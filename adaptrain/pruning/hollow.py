"""Models whose parameters have shapes and no memory: to count what a model costs without holding it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from adaptrain.resources.heap import LEAST_OUTSIDE, blocks_outside_of_heap


def hollow(parameter: Tensor) -> nn.Parameter:
    """Returns a parameter of the same shape, dtype and device in the memory of one number, a zero."""
    data = parameter.detach().new_zeros(()).expand(parameter.shape)
    return nn.Parameter(data, parameter.requires_grad)


def is_hollow(tensor: object) -> bool:
    """Whether something is a plain tensor that holds fewer numbers than its shape says."""
    if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return tensor.untyped_storage().nbytes() < tensor.nbytes


def hollow_model(build: Callable[[], nn.Module], *, like: nn.Parameter) -> nn.Module:
    """Builds a model that never holds more than one of its matrices at a time.

    It runs, and what its operators compute and allocate is what those of a real one do; what it answers means nothing.

    Args:
        build: Builds the model.
        like: Its device and dtype become those of the model.
    """
    try:
        # Outside of the heap, so that each matrix goes back before the next one comes.
        with _parameters_on_meta(), blocks_outside_of_heap(LEAST_OUTSIDE):
            model = build()
    except RuntimeError:  # its constructor reads the weights that it made
        model = build()
    made: dict[nn.Parameter, nn.Parameter] = {}  # one that is tied stays tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    # Vectors are small, and how a linear layer computes depends on how its bias lies.
                    small = parameter.shape if parameter.dim() < 2 else ()
                    data = like.detach().new_zeros(small).expand(parameter.shape)
                    made[parameter] = nn.Parameter(data, parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                dtype = like.dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = buffer.to(like.device, dtype)
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Sends each parameter to the meta device when a module takes it; so accelerate's `init_empty_weights`."""
    register = nn.Module.register_parameter

    def take(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if type(param) is nn.Parameter and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = take
    try:
        yield
    finally:
        nn.Module.register_parameter = register
