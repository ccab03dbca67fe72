"""Cap: lower a learning rate that is too high."""

from __future__ import annotations

from adaptrain.policies.learning_rate.factor import Factor


class Cap(Factor):
    """Keeps one step from moving a typical weight matrix by more than a small share of its size.

        r = lr · median over tensors of ‖û‖/‖θ_ref‖,    cap = min(1, κ/r)

    û is the optimizer's update at rate 1 (Adam: bias-corrected), θ_ref the tensor of two or more dimensions as it was
    at the start of training or at the last structural change. The current norm would not do: a rate that is too high
    makes the weights grow, which would excuse it. The bound is that of trust-ratio optimizers (LARS, You et al. 2017,
    arXiv:1708.03888) used as a limit on the whole step, not as a rate per layer.

    Weights that were trained before hold what is to be kept, and take a much shorter step than fresh ones do: the usual
    rates for fine-tuning transformers, 1e-5 to 1e-4, come to κ of 0.0002 to 0.001.

    Args:
        kappa: The largest relative change in one step, κ.
    """

    FRESH = 0.02
    TRAINED = 0.0008

    _state = ("ratio", "kappa")

    def __init__(self, *, kappa: float = FRESH) -> None:
        self.kappa = kappa
        self.ratio: float | None = None

    def observe(self, ratio: float | None) -> None:
        """Takes in the median ‖û‖/‖θ_ref‖ per unit of learning rate; None: not known."""
        self.ratio = ratio

    def value(self, rate: float) -> float:
        """Returns the factor in (0, 1] for a step at the learning rate `rate`."""
        if self.ratio is None or rate * self.ratio <= self.kappa:
            return 1.0
        return self.kappa / (rate * self.ratio)
