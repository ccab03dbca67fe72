"""A small member answers, together with a larger one where it is unsure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from adaptrain.family.calibration import calibration_error
from adaptrain.family.member import Member, Prediction, Progress, class_logits, prediction
from adaptrain.family.samples import Samples
from adaptrain.resources.clock import timed

if TYPE_CHECKING:
    from adaptrain.family.model_family import ModelFamily

Name = TypeVar("Name", str, str | None)

_TURNS = 3
_TURN_S = 10.0  # a turn that takes longer is not repeated
_PIECE = 4  # batches that one answers before it is another's turn


@dataclass(frozen=True, kw_only=True)
class CascadeReport:
    """What a cascade came to on samples that it was not chosen on, beside every member alone.

    Args:
        small: The member that answers first.
        large: The member that is asked where the first is unsure.
        threshold: The calibrated confidence below which it is asked.
        temperatures: Of the logits of both, by member.
        weight: Of the large member's probabilities in the mean that answers where it was asked.
        metric: The accuracy of the cascade, in [0, 1].
        metrics: Of each member alone, by name.
        escalated: The share of samples that the large member was asked.
        throughput: Samples per second, measured; batches and padding counted in, tokenizing and waiting for a core not.
        throughputs: Of each member alone, in turns with the cascade, by name.
        calibration_error: Expected calibration error of the small member's confidence, with its temperature.
        uncalibrated_error: The same without.
        chosen_on: Samples that temperatures and threshold were chosen on.
        judged_on: Other samples, that all of the above is of.
        batch_size: Samples at once.
        device: Where.
    """

    small: str
    large: str
    threshold: float
    temperatures: dict[str, float]
    weight: float
    metric: float
    metrics: dict[str, float]
    escalated: float
    throughput: float
    throughputs: dict[str, float]
    calibration_error: float
    uncalibrated_error: float
    chosen_on: int
    judged_on: int
    batch_size: int
    device: str

    @property
    def slowest(self) -> str:
        """The member that costs are fractions of: the dense one, as a rule."""
        return min(self.throughputs, key=lambda name: self.throughputs[name])

    @property
    def cost(self) -> float:
        """The time of the cascade, as a fraction of the slowest member's alone."""
        return self.throughputs[self.slowest] / self.throughput

    @property
    def best_alone(self) -> str | None:
        """The best member that takes no more time than the cascade; None: there is none."""
        names = [name for name, each in self.throughputs.items() if each >= self.throughput]
        return max(names, key=lambda name: self.metrics[name], default=None)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, from the number of samples it was judged on."""
        return math.sqrt(self.metric * (1 - self.metric) / self.judged_on)

    def asdict(self) -> dict[str, Any]:
        """Returns all of it as plain Python; an infinite threshold, which escalates all, is None."""
        plain = asdict(self) | {"cost": self.cost, "standard_error": self.standard_error}
        return plain | {"threshold": None if math.isinf(self.threshold) else self.threshold}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> CascadeReport:
        """Returns what `asdict` was of."""
        values: dict[str, Any] = {k: value for k, value in plain.items() if k not in ("cost", "standard_error")}
        values["threshold"] = math.inf if plain["threshold"] is None else plain["threshold"]
        return cls(**values)

    def __str__(self) -> str:
        slowest = self.throughputs[self.slowest]
        rows = [("cascade", self.metric, self.throughput)]
        rows += [(f"{name} alone", self.metrics[name], each) for name, each in self.throughputs.items()]
        lines = [
            f"  {name:<24} accuracy {100 * accuracy:5.1f}%   {throughput:8.1f} samples/s   {throughput / slowest:5.2f}x"
            for name, accuracy, throughput in sorted(rows, key=lambda row: -row[2])
        ]
        error = f"{100 * self.uncalibrated_error:.1f} → {100 * self.calibration_error:.1f} points"
        lines += [
            f"  {self.small} answers, and asks {self.large} below a confidence of {self.threshold:.3f}:"
            f" {100 * self.escalated:.1f}% of samples; cost {self.cost:.2f} of {self.slowest}",
            f"  then both answer, with a weight of {self.weight:.2f} for {self.large}",
            f"  temperature {self.temperatures[self.small]:.2f}, calibration error {error}",
            f"  judged on {self.judged_on} validation samples (accuracy ± {100 * self.standard_error:.1f} points,"
            f" standard error), chosen on {self.chosen_on} others; {self.batch_size} at once on {self.device}",
        ]
        if (name := self.best_alone) is not None and self.metrics[name] >= self.metric:
            lines.append(f"  {name} alone is as good in no more time: rather use it, family[{name!r}]")
        return "\n".join(lines)


class Cascade:
    """Answers with a small member, and asks a larger one too where the small one's confidence is below a threshold.

    The small member sees all texts first; those that it is unsure of are gathered and go to the large one in full
    batches. Confidence is the largest probability at a temperature (Guo et al. 2017). Of those texts the answer is the
    weighted mean of both members' probabilities: what the small one said is there already, and two are better than one
    (a cascade of ensembles, Wang et al. 2022, arXiv:2012.01988).

    Args:
        family: The family.
        small: The member that answers first.
        large: The member that is asked where the first is unsure.
        threshold: The confidence below which it is asked.
        temperatures: Of the logits of both, by member.
        weight: Of the large member's probabilities in the mean, in [0, 1]; 1: it answers alone where it is asked.
        device: Where.
    """

    def __init__(
        self,
        family: ModelFamily,
        small: Member,
        large: Member,
        *,
        threshold: float,
        temperatures: Mapping[str, float],
        weight: float = 0.5,
        device: str | torch.device | None = None,
    ) -> None:
        self._family = family
        self.small, self.large = small, large
        self.threshold = threshold
        self.temperatures = dict(temperatures)
        self.weight = weight
        self.device = family.device if device is None else torch.device(device)
        self.report: CascadeReport | None = None

    def __repr__(self) -> str:
        return f"Cascade({self.small.name!r} → {self.large.name!r}, threshold={self.threshold:.4g})"

    @property
    def pad_id(self) -> int:
        """The id that batches are padded with."""
        return self._family.pad_id

    def predict(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[Prediction]:
        """Returns the label of each text, in their order; `member` says who was asked last.

        Args:
            texts: The texts; one alone may be given as it is.
            batch_size: Texts at once.
            progress: Told how many more texts are done.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return []
        probabilities, asked = self.classify(self._family.encode(texts), batch_size=batch_size, progress=progress)
        return [
            prediction(row, self._family.labels, self.large.name if escalated else self.small.name)
            for row, escalated in zip(probabilities, asked.tolist(), strict=True)
        ]

    def classify(
        self, ids: Sequence[Tensor], *, batch_size: int = 32, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the calibrated probabilities, shape (samples, classes), and who was escalated, shape (samples,).

        Args:
            ids: The token ids of each sample.
            batch_size: Samples at once.
            progress: Told how many more samples are done.
        """
        small = self.small.model(self.device)
        probabilities = self._probabilities(self.small, class_logits(small, ids, self.pad_id, batch_size=batch_size))
        asked = probabilities.max(-1).values < self.threshold
        if progress is not None:
            progress(int((~asked).sum()))
        places = asked.nonzero()[:, 0]
        if len(places):
            large = self.large.model(self.device)
            chosen = [ids[place] for place in places.tolist()]
            logits = class_logits(large, chosen, self.pad_id, batch_size=batch_size, progress=progress)
            probabilities[places] = probabilities[places].lerp(self._probabilities(self.large, logits), self.weight)
        return probabilities, asked

    def _probabilities(self, member: Member, logits: Tensor) -> Tensor:
        return (logits / self.temperatures[member.name]).softmax(-1)


def alone(member: Member, cascade: Cascade, batch_size: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """Returns what lets a member answer by itself, where the cascade does."""
    model, pad_id = member.model(cascade.device), cascade.pad_id
    return lambda piece: class_logits(model, piece, pad_id, batch_size=batch_size)


def judge(
    cascade: Cascade, members: Sequence[Member], samples: Samples, *, batch_size: int, chosen_on: int, device: str
) -> CascadeReport:
    """Measures a cascade beside the family's members on samples that it was not chosen on.

    All take turns; of each the median over the faster half of its turns counts.
    """
    ids = samples.ids
    runs = {member.name: alone(member, cascade, batch_size) for member in members}
    whole: dict[str | None, Callable[[Sequence[Tensor]], Any]] = {
        None: lambda p: cascade.classify(p, batch_size=batch_size)
    }
    results, seconds = in_turns(whole | runs, ids, batch_size, cascade.device)
    probabilities, asked = (torch.cat(parts) for parts in zip(*results[None], strict=True))
    logits = {name: torch.cat(results[name]) for name in runs}
    unsure = logits[cascade.small.name]
    calibrated = (unsure / cascade.temperatures[cascade.small.name]).softmax(-1)
    return CascadeReport(
        small=cascade.small.name,
        large=cascade.large.name,
        threshold=cascade.threshold,
        temperatures=cascade.temperatures,
        weight=cascade.weight,
        metric=_accuracy(probabilities, samples.labels),
        metrics={name: _accuracy(each, samples.labels) for name, each in logits.items()},
        escalated=float(asked.float().mean()),
        throughput=len(samples) / seconds[None],
        throughputs={name: len(samples) / seconds[name] for name in runs},
        calibration_error=calibration_error(calibrated, samples.labels),
        uncalibrated_error=calibration_error(unsure.softmax(-1), samples.labels),
        chosen_on=chosen_on,
        judged_on=len(samples),
        batch_size=batch_size,
        device=device,
    )


def in_turns(
    runs: Mapping[Name, Callable[[Sequence[Tensor]], Any]], ids: Sequence[Tensor], batch_size: int, device: torch.device
) -> tuple[dict[Name, list[Any]], dict[Name, float]]:
    """Returns what functions make of samples, piece by piece, and the seconds each takes for all of them.

    On every piece of a few batches the functions take turns, in an order that rotates, so that a machine that is busy
    for a while slows all of them and not one; of repeated rounds the median over the faster half counts.
    """
    names, size = list(runs), _PIECE * batch_size
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    results: dict[Name, list[Any]] = {name: [] for name in names}
    times: dict[Name, list[float]] = {name: [] for name in names}
    for name in names:
        runs[name](pieces[0][:batch_size])  # a warm-up
    for turn in range(_TURNS):
        spent = dict.fromkeys(names, 0.0)
        for number, piece in enumerate(pieces):
            for position in range(len(names)):
                name = names[(turn + number + position) % len(names)]
                found, seconds = timed(partial(runs[name], piece), device)
                spent[name] += seconds
                if turn == 0:
                    results[name].append(found)
        for name in names:
            times[name].append(spent[name])
        if sum(spent.values()) > _TURN_S:
            break
    return results, {name: statistics.median(sorted(each)[: (len(each) + 1) // 2]) for name, each in times.items()}


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(-1) == labels).float().mean())
