"""What is asked of a cascade: checked, served, and kept with the family for the next time."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

import adaptrain
from adaptrain.errors import ConfigurationError
from adaptrain.family.cascade import Cascade, CascadeReport
from adaptrain.family.choose_cascade import choose
from adaptrain.family.samples import Samples, load
from adaptrain.resources.device import device_name

if TYPE_CHECKING:
    from adaptrain.family.model_family import ModelFamily

_log = logging.getLogger(__name__)

FEWEST = 40  # validation samples: one half to choose on, the other to judge on
FOLDER = "cascades"  # in a family's folder
_DEFAULT_COST = 0.5


@dataclass(frozen=True, kw_only=True)
class CascadeRequest:
    """The arguments of `ModelFamily.cascade`, explained there.

    Raises:
        ConfigurationError: One is out of its range.
    """

    cost: float | None
    accuracy: float | None
    small: str | None
    large: str | None
    batch_size: int

    def __post_init__(self) -> None:
        if self.cost is not None and self.accuracy is not None:
            raise ConfigurationError(
                f"Give cost or accuracy, not both: got cost={self.cost!r} and accuracy={self.accuracy!r}."
            )
        if self.cost is None and self.accuracy is None:
            object.__setattr__(self, "cost", _DEFAULT_COST)
        for name, value, most in (("cost", self.cost, math.inf), ("accuracy", self.accuracy, 1.0)):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value <= most):
                allowed = "greater than 0" if name == "cost" else "in (0, 1]"
                raise ConfigurationError(f"{name} must be a number {allowed}, got {value!r}.")

    def serve(
        self,
        family: ModelFamily,
        device: torch.device,
        *,
        data: tuple[Sequence[str], Sequence[str]] | None,
        again: bool,
    ) -> Cascade:
        """Returns the cascade: the one that was kept, or one that is chosen and measured now."""
        if family.task == "language_model":
            raise ConfigurationError("A cascade needs labels to be sure of; this family is of language models.")
        if data is None and not again and (kept := self._recall(family, device)) is not None:
            return kept
        samples = _kept_samples(family) if data is None else _given_samples(family, *data)
        if len(samples) < FEWEST:
            raise ConfigurationError(
                f"A cascade is chosen on one half of the validation samples and judged on the other: {len(samples)} are"
                f" too few, it takes {FEWEST}."
            )
        _log.info("Choosing a cascade on %d validation samples.", len(samples))
        cascade = choose(family, samples, **asdict(self), device=device, device_name=device_name(device))
        if data is None:
            self._keep(family, cascade)
        return cascade

    def _key(self, family: ModelFamily, device: torch.device) -> str:
        """A name for the request, another one where a weight of the family changed."""
        known = [adaptrain.__version__, family.fingerprint, device_name(device), asdict(self)]
        return blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=8).hexdigest()

    def _recall(self, family: ModelFamily, device: torch.device) -> Cascade | None:
        path = family.folder / FOLDER / f"{self._key(family, device)}.json"
        try:
            report = CascadeReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError):  # none, or of another version: it is made anew
            return None
        cascade = Cascade(
            family,
            family[report.small],
            family[report.large],
            threshold=report.threshold,
            temperatures=report.temperatures,
            weight=report.weight,
            device=device,
        )
        cascade.report = report
        return cascade

    def _keep(self, family: ModelFamily, cascade: Cascade) -> None:
        assert cascade.report is not None
        path = family.folder / FOLDER / f"{self._key(family, cascade.device)}.json"
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_text(json.dumps(cascade.report.asdict(), indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError:
            _log.debug("The cascade cannot be kept in %s.", family.folder)


def _kept_samples(family: ModelFamily) -> Samples:
    samples = load(family.folder)
    if samples is None:
        raise ConfigurationError(
            f"The family in {family.folder} has no validation samples to choose a cascade on: its run had no validation"
            " data of labelled tokens, or FamilyCheckpoint(validation_samples=0). Give some: data=(texts, labels)."
        )
    return samples


def _given_samples(family: ModelFamily, texts: Sequence[str], labels: Sequence[str]) -> Samples:
    if len(texts) != len(labels):
        raise ConfigurationError(f"data holds {len(texts)} texts and {len(labels)} labels; give one for each.")
    if unknown := sorted({str(label) for label in labels} - set(family.labels)):
        raise ConfigurationError(
            f"data has the labels {', '.join(unknown[:5])}, the family knows {', '.join(family.labels)}."
        )
    return Samples(family.encode(list(texts)), torch.tensor([family.labels.index(str(label)) for label in labels]))
