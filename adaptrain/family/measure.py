"""What the members of a family cost on one device, measured side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from adaptrain.pruning import cost
from adaptrain.pruning.families import find_family


def shape_key(shape: tuple[int, int]) -> str:
    """Returns a shape (samples, tokens of each) as text: `"32x128"`."""
    return f"{shape[0]}x{shape[1]}"


def measure_costs(models: Mapping[str, nn.Module], shape: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Measures models at one shape on the device they are on.

    Args:
        models: The models by name, all on one device.
        shape: Samples, and tokens of each.

    Returns:
        By name: `latency_ms` of a forward pass, as `adaptrain.pruning.cost.measure_latency` finds it; `flops` of it;
        and `peak_memory_bytes`, the most that its weights and tensors occupy at once, as torch's operators see it.

    Raises:
        ConfigurationError: A model cannot read a sample of that length.
    """
    inputs = find_family(next(iter(models.values()))).example_inputs(*shape)
    latencies = cost.measure_latency(models, inputs, copies=cost.COPIES)
    return {
        name: {
            "latency_ms": latencies[name],
            "flops": cost.count_flops(model, inputs),
            "peak_memory_bytes": _weight_bytes(model) + cost.peak_activation_bytes(model, inputs),
        }
        for name, model in models.items()
    }


def _weight_bytes(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
