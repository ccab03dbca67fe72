"""Which two members make the best cascade, and from which confidence on the small one answers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptrain.errors import ConfigurationError
from adaptrain.family.calibration import fit_temperature, fit_weight, of_right
from adaptrain.family.cascade import Cascade, alone, in_turns, judge
from adaptrain.family.member import Member, class_logits
from adaptrain.family.samples import Samples
from adaptrain.policies.cascade import accuracy_at, threshold_for_accuracy, threshold_for_share

if TYPE_CHECKING:
    from adaptrain.family.model_family import ModelFamily

_AIM = 0.98  # of a cost: what noise may take away again
_NEAR = 0.93  # of a cost: below it, more could be escalated
_ROUNDS = 3


@dataclass(frozen=True)
class _Seen:
    """What one member says of the samples that are chosen on."""

    member: Member
    temperature: float
    probabilities: Tensor
    right: list[bool]
    of_right: Tensor  # the probability of the right class, by sample
    seconds: float

    @functools.cached_property
    def confidences(self) -> list[float]:
        return self.probabilities.max(-1).values.tolist()

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class _Pair:
    """Who answers and whom it may ask; `right`, `of_right`: of both together, with that weight for the second."""

    small: _Seen
    large: _Seen
    weight: float
    right: list[bool]
    of_right: Tensor


@dataclass(frozen=True)
class _Plan:
    """A cascade that meets what was asked, as expected from its members; `share`: what may be escalated for a cost.

    `likely`: the mean probability of the right class. It ranks plans better than the number of right answers, which
    a few samples near the border decide.
    """

    pair: _Pair
    share: float
    threshold: float
    cost: float
    likely: float


def choose(
    family: ModelFamily,
    samples: Samples,
    *,
    cost: float | None,
    accuracy: float | None,
    small: str | None,
    large: str | None,
    batch_size: int,
    device: torch.device,
    device_name: str,
) -> Cascade:
    """Chooses on one half of the samples and judges on the other; see `ModelFamily.cascade` for what is raised."""
    first, second = samples.halves()
    chosen_on, judged_on = samples.pick(first), samples.pick(second)
    seen = _look(family, chosen_on, batch_size, device)
    slowest = max(seen, key=lambda each: each.seconds)
    pairs = _pairs(family, seen, small, large, chosen_on.labels)
    plans = [plan for pair in pairs if (plan := _plan(pair, slowest, cost, accuracy)) is not None]
    if not plans:
        raise ConfigurationError(_why_not(pairs, slowest, cost, accuracy))
    if accuracy is None:
        plans.sort(key=lambda each: (-each.likely, each.cost))
    else:
        plans.sort(key=lambda each: each.cost)
    missed: list[tuple[float, Member]] = []
    for plan in plans:
        pair = plan.pair
        cascade = Cascade(
            family,
            pair.small.member,
            pair.large.member,
            threshold=plan.threshold,
            temperatures={each.member.name: each.temperature for each in (pair.small, pair.large)},
            weight=pair.weight,
            device=device,
        )
        over = None if cost is None else _correct(cascade, plan, slowest, chosen_on, cost, batch_size)
        if over is None:
            break
        missed.append((over, pair.small.member))
    else:
        assert cost is not None
        least, member = min(missed, key=lambda each: each[0])
        raise ConfigurationError(_too_slow(member, slowest.member, least, cost))
    cascade.report = judge(
        cascade, family.members, judged_on, batch_size=batch_size, chosen_on=len(chosen_on), device=device_name
    )
    return cascade


def _pairs(family: ModelFamily, seen: list[_Seen], small: str | None, large: str | None, labels: Tensor) -> list[_Pair]:
    """Returns who may answer and whom it may ask: a slower member that adds something, as far as they are not named."""
    first = seen if small is None else [_named(family, seen, small)]
    then = seen if large is None else [_named(family, seen, large)]
    if small is not None and large is not None and first[0].seconds >= then[0].seconds:
        raise ConfigurationError(
            f"The member {small!r} takes {1e3 * first[0].seconds / len(labels):.3g} ms a sample, and {large!r}"
            f" {1e3 * then[0].seconds / len(labels):.3g} ms: a cascade begins with the faster one."
        )
    pairs = [
        _pair(one, other, labels)
        for one in first
        for other in then
        if one.seconds < other.seconds and one.member.params < other.member.params
    ]
    pairs = [pair for pair in pairs if large is not None or sum(pair.right) > sum(pair.small.right)]
    if not pairs:
        best = max(then, key=lambda each: (each.accuracy, -each.seconds))
        asks = "a cascade can gain nothing: use it alone" if small is None else f"{small!r} has no one to ask"
        raise ConfigurationError(
            f"The member {best.member.name!r} has the best accuracy, and no slower one makes a faster one better, so"
            f" {asks}. FamilyCheckpoint(recovery_steps=...) finishes the training of larger members. Or name it:"
            " family.cascade(..., large=...)."
        )
    return pairs


def _pair(small: _Seen, large: _Seen, labels: Tensor) -> _Pair:
    weight = fit_weight(small.probabilities, large.probabilities, labels)
    together = small.probabilities.lerp(large.probabilities, weight)
    return _Pair(small, large, weight, (together.argmax(-1) == labels).tolist(), of_right(together, labels))


def _look(family: ModelFamily, samples: Samples, batch_size: int, device: torch.device) -> list[_Seen]:
    """Lets every member answer, in turns."""
    models = {member.name: member.model(device) for member in family.members}

    def answer(model: Any) -> Any:
        return lambda piece: class_logits(model, piece, family.pad_id, batch_size=batch_size)

    runs = {name: answer(model) for name, model in models.items()}
    answers, seconds = in_turns(runs, samples.ids, batch_size, device)
    seen = []
    for member in family.members:
        own = torch.cat(answers[member.name])
        temperature = fit_temperature(own, samples.labels)
        probabilities = (own / temperature).softmax(-1)
        right = (probabilities.argmax(-1) == samples.labels).tolist()
        chances = of_right(probabilities, samples.labels)
        seen.append(_Seen(member, temperature, probabilities, right, chances, seconds[member.name]))
    return seen


def _named(family: ModelFamily, seen: list[_Seen], name: str) -> _Seen:
    member = family[name]
    return next(each for each in seen if each.member is member)


def _plan(pair: _Pair, slowest: _Seen, cost: float | None, accuracy: float | None) -> _Plan | None:
    base, each = (member.seconds / slowest.seconds for member in (pair.small, pair.large))
    confidences = pair.small.confidences
    if cost is not None:
        share = min(1.0, (cost * _AIM - base) / each)
        if share < 0:
            return None
        threshold = threshold_for_share(confidences, share)
    else:
        assert accuracy is not None
        answer = threshold_for_accuracy(confidences, pair.small.right, pair.right, accuracy)
        if answer is None:
            return None
        share, threshold = 1.0, answer[0]
    asked = torch.tensor([confidence < threshold for confidence in confidences])
    likely = torch.where(asked, pair.of_right, pair.small.of_right).mean()
    return _Plan(pair, share, threshold, base + float(asked.float().mean()) * each, float(likely))


def _correct(
    cascade: Cascade, plan: _Plan, slowest: _Seen, samples: Samples, cost: float, batch_size: int
) -> float | None:
    """Measures the cascade, and moves its threshold until the measured cost is at what was asked.

    Samples that the small model is unsure of may be longer than others, and batches not full: sums do not tell.

    Returns:
        None; or the measured cost without any escalation, where that alone is too much.
    """
    runs = {
        "cascade": lambda piece: cascade.classify(piece, batch_size=batch_size),
        "slowest": alone(slowest.member, cascade, batch_size),
    }
    each, share = plan.pair.large.seconds / slowest.seconds, plan.share
    fits, fitting = -1.0, cascade.threshold
    for _ in range(_ROUNDS):
        _, seconds = in_turns(runs, samples.ids, batch_size, cascade.device)
        measured = seconds["cascade"] / seconds["slowest"]
        if measured <= cost and share > fits:
            fits, fitting = share, cascade.threshold
        if cost * _NEAR <= measured <= cost or (measured <= cost and share >= 1):
            break
        if measured > cost and share <= 0:
            return measured
        share = min(1.0, max(0.0, share + (cost * _AIM - measured) / each))
        cascade.threshold = threshold_for_share(plan.pair.small.confidences, share)
    if fits >= 0:
        cascade.threshold = fitting
    return None


def _too_slow(small: Member, slowest: Member, least: float, cost: float) -> str:
    excess = f"{least - cost:.2g} too much" if least > cost else "which leaves nothing to escalate with"
    return (
        f"cost={cost:g} cannot be met: {small.name!r} alone, which sees every sample, takes {least:.3f} of the time of"
        f" {slowest.name!r}, {excess}. Raise the cost, or prune further."
    )


def _why_not(pairs: list[_Pair], slowest: _Seen, cost: float | None, accuracy: float | None) -> str:
    if cost is not None:
        fastest = min((pair.small for pair in pairs), key=lambda each: each.seconds)
        return _too_slow(fastest.member, slowest.member, fastest.seconds / slowest.seconds, cost)
    assert accuracy is not None
    reached = max(
        accuracy_at(pair.small.confidences, pair.small.right, pair.right, threshold)
        for pair in pairs
        for threshold in (*pair.small.confidences, math.inf)
    )
    return (
        f"accuracy={accuracy:g} cannot be met: the best that a cascade reaches on validation is {reached:.4g},"
        f" {accuracy - reached:.2g} short. Lower the demand."
    )
