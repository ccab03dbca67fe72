"""Which two members make the best cascade, and from which confidence on the small one answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from adaptrain.errors import ConfigurationError
from adaptrain.family.calibration import fit_temperature
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
    confidences: list[float]
    right: list[bool]
    seconds: float

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class _Plan:
    """A cascade that meets what was asked, as expected from its members."""

    small: _Seen
    large: _Seen
    threshold: float
    cost: float
    accuracy: float


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
    best = _named(family, seen, large) if large is not None else _best(family, seen)
    smaller = [each for each in seen if each.seconds < best.seconds and each.member.params < best.member.params]
    if small is not None:
        smaller = [_named(family, seen, small)]
        if smaller[0].seconds >= best.seconds:
            raise ConfigurationError(
                f"The member {small!r} takes {1e3 * smaller[0].seconds / len(chosen_on):.3g} ms a sample, and"
                f" {best.member.name!r} {1e3 * best.seconds / len(chosen_on):.3g} ms: a cascade begins with the faster"
                " one."
            )
    if not smaller:
        raise ConfigurationError(
            f"The member {best.member.name!r}, of the best {family.metric or 'accuracy'}, is the fastest as well, so a"
            " cascade can save nothing: use it alone. Members that are larger have to be better to be worth asking;"
            " FamilyCheckpoint(recovery_steps=...) finishes their training. Or name one: large=..."
        )
    plans = [plan for each in smaller if (plan := _plan(each, best, cost, accuracy)) is not None]
    if not plans:
        raise ConfigurationError(_why_not(smaller, best, cost, accuracy))
    if accuracy is None:
        plans.sort(key=lambda each: (-each.accuracy, each.cost))
    else:
        plans.sort(key=lambda each: each.cost)
    missed: list[tuple[float, Member]] = []
    for plan in plans:
        cascade = Cascade(
            family,
            plan.small.member,
            plan.large.member,
            threshold=plan.threshold,
            temperatures={each.member.name: each.temperature for each in (plan.small, plan.large)},
            device=device,
        )
        over = None if cost is None else _correct(cascade, plan, chosen_on, cost, batch_size)
        if over is None:
            break
        missed.append((over, plan.small.member))
    else:
        assert cost is not None
        least, member = min(missed, key=lambda each: each[0])
        raise ConfigurationError(_too_slow(member, best.member, least, cost))
    cascade.report = judge(cascade, judged_on, batch_size=batch_size, chosen_on=len(chosen_on), device=device_name)
    return cascade


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
        confidences, classes = (own / temperature).softmax(-1).max(-1)
        right = (classes == samples.labels).tolist()
        seen.append(_Seen(member, temperature, confidences.tolist(), right, seconds[member.name]))
    return seen


def _named(family: ModelFamily, seen: list[_Seen], name: str) -> _Seen:
    member = family[name]
    return next(each for each in seen if each.member is member)


def _best(family: ModelFamily, seen: list[_Seen]) -> _Seen:
    """The member of the best accuracy; the family's own metric is of more samples where it is one."""
    by_metric = "acc" in (family.metric or "").lower() and all(each.member.metric is not None for each in seen)
    return max(seen, key=lambda each: (each.member.metric if by_metric else each.accuracy, -each.seconds))


def _plan(small: _Seen, large: _Seen, cost: float | None, accuracy: float | None) -> _Plan | None:
    base = small.seconds / large.seconds
    if cost is not None:
        share = cost * _AIM - base
        if share < 0:
            return None
        threshold = threshold_for_share(small.confidences, share)
    else:
        assert accuracy is not None
        answer = threshold_for_accuracy(small.confidences, small.right, large.right, accuracy)
        if answer is None:
            return None
        threshold = answer[0]
    escalated = sum(confidence < threshold for confidence in small.confidences) / len(small.confidences)
    reached = accuracy_at(small.confidences, small.right, large.right, threshold)
    return _Plan(small, large, threshold, base + escalated, reached)


def _correct(cascade: Cascade, plan: _Plan, samples: Samples, cost: float, batch_size: int) -> float | None:
    """Measures the cascade, and moves its threshold until the measured cost is at what was asked.

    Samples that the small model is unsure of may be longer than others, and batches not full: sums do not tell.

    Returns:
        None; or the measured cost without any escalation, where that alone is too much.
    """
    runs = {
        "cascade": lambda piece: cascade.classify(piece, batch_size=batch_size),
        "large": alone(cascade.large, cascade, batch_size),
    }
    share = min(1.0, cost * _AIM - plan.small.seconds / plan.large.seconds)
    fits, fitting = -1.0, cascade.threshold
    for _ in range(_ROUNDS):
        _, seconds = in_turns(runs, samples.ids, batch_size, cascade.device)
        measured = seconds["cascade"] / seconds["large"]
        if measured <= cost and share > fits:
            fits, fitting = share, cascade.threshold
        if cost * _NEAR <= measured <= cost or (measured <= cost and share >= 1):
            break
        if measured > cost and share <= 0:
            return measured
        share = min(1.0, max(0.0, share + cost * _AIM - measured))
        cascade.threshold = threshold_for_share(plan.small.confidences, share)
    if fits >= 0:
        cascade.threshold = fitting
    return None


def _too_slow(small: Member, large: Member, least: float, cost: float) -> str:
    excess = f"{least - cost:.2g} too much" if least > cost else "which leaves nothing to escalate with"
    return (
        f"cost={cost:g} cannot be met: {small.name!r} alone, which sees every sample, takes {least:.3f} of the time of"
        f" {large.name!r}, {excess}. Raise the cost, or prune further."
    )


def _why_not(smaller: list[_Seen], large: _Seen, cost: float | None, accuracy: float | None) -> str:
    if cost is not None:
        fastest = min(smaller, key=lambda each: each.seconds)
        return _too_slow(fastest.member, large.member, fastest.seconds / large.seconds, cost)
    assert accuracy is not None
    reached = max(
        accuracy_at(small.confidences, small.right, large.right, threshold)
        for small in smaller
        for threshold in (*small.confidences, math.inf)
    )
    return (
        f"accuracy={accuracy:g} cannot be met: the best that a cascade reaches on validation is {reached:.4g},"
        f" {accuracy - reached:.2g} short. Lower the demand."
    )
