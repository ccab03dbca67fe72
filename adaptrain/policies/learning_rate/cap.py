"""Cap: lower a learning rate that is too high."""

from __future__ import annotations

import math

from adaptrain.policies.learning_rate.factor import Factor


class Cap(Factor):
    """Keeps one step from moving a typical weight matrix by more than a small share of its singular values.

        r = lr · median over tensors of ‖û‖_F/σ_ref,    σ_ref = ‖θ_ref‖_F/√rank,    cap = min(1, limit/r)

    û is the optimizer's update at rate 1 (Adam: bias-corrected), θ_ref the tensor of two or more dimensions as it was
    at the start of training or at the last structural change, σ_ref the root mean square of its singular values. An
    update has few large singular values, so that its Frobenius norm tells its spectral norm; a fresh weight has many
    alike. It is the change of the spectral norm that has to stay the same over widths (Yang, Simon & Bernstein 2023,
    arXiv:2310.17813): a limit on ‖û‖_F/‖θ‖_F allows wide models too much or narrow ones too little. The current norm
    would not do as a measure: a rate that is too high makes the weights grow, which would excuse it. A bound on the
    relative step is that of trust-ratio optimizers (LARS, You et al. 2017, arXiv:1708.03888), here on the whole step
    and not as a rate per layer.

    The limit begins at κ, on the safe side. Where gradients still agree for sure although the cap binds (see `Align`),
    it grows by e^¼, up to `room` times κ, and where they oppose each other it shrinks again.

    Weights that were trained before hold what is to be kept, and take a much shorter step than fresh ones do: the usual
    rates for fine-tuning transformers, 1e-5 to 1e-4, come to κ of 0.004 to 0.03 in their first steps (of 384 to 768
    hidden units), and to less as the moments settle. MiniLM ends at 1.3e-4 to 1.6e-4 under the κ that is used here.

    lr is the present rate, but at least `annealed` of the schedule's highest: below that, what the schedule anneals is
    annealed from the capped rate as well. Were it the present rate alone, annealing would not show before the schedule
    is below the cap, which is at the very end where the rate that was typed is far too high. Trained weights follow the
    schedule all the way down (1); fresh ones, which still gain from long steps, from a quarter of its highest rate on.

    Args:
        kappa: The relative change in one step that is allowed at first, κ.
        room: How many times κ the limit may become.
        annealed: The share of the schedule's highest rate below which annealing shows although the cap binds.
    """

    FRESH = 0.13
    TRAINED = 0.008
    ROOM = 4.0
    ANNEALED = 0.25  # fresh weights

    _state = ("ratio", "kappa", "annealed", "slack", "most")

    def __init__(self, *, kappa: float = FRESH, room: float = 1.0, annealed: float = 1.0) -> None:
        self.kappa = kappa
        self.annealed = annealed
        self.ratio: float | None = None
        self.slack = 0.0  # logarithm of how many times κ the limit is
        self.most = math.log(room)

    def observe(self, ratio: float | None) -> None:
        """Takes in the median ‖û‖_F/σ_ref per unit of learning rate; None: not known."""
        self.ratio = ratio

    def adjust(self, evidence: int) -> None:
        """Gives way where `evidence` is 1: gradients agree although the cap binds; takes that back where it is -1."""
        self.slack = max(0.0, min(self.slack + 0.25 * evidence, self.most))

    def relapse(self) -> None:
        """After a divergence: never again more than half of the limit it happened at."""
        self.most = max(0.0, self.slack - math.log(2))
        self.slack = min(self.slack, self.most)

    @property
    def limit(self) -> float:
        """The relative change in one step that is allowed now."""
        return self.kappa * math.exp(self.slack)

    def headroom(self, rate: float) -> float:
        """Returns how many times as long a step at the learning rate `rate` may be; 1 where that is not known."""
        return self.limit / (rate * self.ratio) if self.ratio and rate > 0 else 1.0

    def value(self, rate: float) -> float:
        """Returns the factor in (0, 1] for a step at the learning rate `rate`."""
        return min(1.0, self.headroom(rate))
