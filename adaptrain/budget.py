"""What may be spent on training and on the deployed model, and how much of the training is spent."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from adaptrain.errors import ConfigurationError

FRACTIONS = ("latency", "params", "flops", "memory")
ABSOLUTES = ("latency_ms", "params_m")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What training may use and what the final model may cost. Every field defaults to None: no limit.

    A fraction in (0, 1] is of the dense model; a name with a unit is absolute.

    Args:
        memory_gib: Memory the training process may use, in GiB (device memory on a GPU, else host memory).
        wall_clock_min: Minutes training may take, from the start of fit, resumed runs counted in.
        latency: Measured inference time of the final model, as a fraction of the dense model's.
        params: Parameters, as a fraction.
        flops: FLOPs of a forward pass, as a fraction.
        memory: Inference memory (weights and activations), as a fraction.
        latency_ms: Measured inference time of the final model in milliseconds.
        params_m: Parameters in millions.
        trainable_params_m: Parameters that training may change, in millions; the others stay as they were.

    Raises:
        ConfigurationError: A value is not a number in its range.
    """

    memory_gib: float | None = None
    wall_clock_min: float | None = None
    latency: float | None = None
    params: float | None = None
    flops: float | None = None
    memory: float | None = None
    latency_ms: float | None = None
    params_m: float | None = None
    trainable_params_m: float | None = None

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value is not None:
                _check(spec.name, value)

    @property
    def target(self) -> dict[str, float]:
        """The limits on the final model that were given, by name."""
        return {name: value for name in FRACTIONS + ABSOLUTES if (value := getattr(self, name)) is not None}

    def asdict(self) -> dict[str, float | None]:
        """Returns every field by name."""
        return asdict(self)


def _check(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigurationError(f"budget.{name} must be a number, got {value!r}.")
    if name in FRACTIONS and not 0 < value <= 1:
        absolute = {"latency": "latency_ms", "params": "params_m"}.get(name)
        hint = f" For an absolute limit use budget.{absolute}." if absolute else ""
        raise ConfigurationError(
            f"budget.{name} is a fraction of the dense model's and must be in (0, 1], got {value}."
            f" Half of it is budget.{name}=0.5.{hint}"
        )
    if value <= 0:
        raise ConfigurationError(f"budget.{name} must be greater than 0, got {value}.")


@dataclass(kw_only=True)
class Progress:
    """How much of a training run is spent, in [0, 1]: the larger of its share of steps and of wall clock.

    Schedules that run on `fraction` instead of a step count end at their end whichever limit comes first.

    Args:
        total_steps: Optimizer steps planned, or None where only the clock ends the run.
        wall_clock_s: Seconds the run may take, or None for no limit.

    Raises:
        ConfigurationError: A limit is not greater than 0.
    """

    total_steps: int | None = None
    wall_clock_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("total_steps", "wall_clock_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"{name} must be greater than 0, got {value}.")

    def fraction(self, *, step: int, elapsed_s: float = 0.0) -> float:
        """Returns the share spent after `step` optimizer steps and `elapsed_s` seconds.

        Without any limit there is no end to measure by, and the result is 0.
        """
        shares = [0.0]
        if self.total_steps is not None:
            shares.append(step / self.total_steps)
        if self.wall_clock_s is not None:
            shares.append(elapsed_s / self.wall_clock_s)
        return min(1.0, max(shares))
