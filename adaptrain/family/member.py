"""One model of a family, and what it says of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import structure as structures

if TYPE_CHECKING:
    from adaptrain.family.model_family import ModelFamily

Progress = Callable[[int], object]
"""Told how many more texts are done."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one text.

    Args:
        output: The label, or the continuation of a language model.
        confidence: The probability of the label, in [0, 1]; None for a language model.
        scores: The probability of each label; empty for a language model.
        member: Which member answered; of a cascade, which was asked last.
    """

    output: str
    confidence: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    member: str = ""


class Member:
    """A model of a family; its weights are read when they are first asked for.

    Attributes:
        name: `"dense"`, `"pruned-1"`, ..., `"final"`.
        step: The optimizer step it was taken at.
        metrics: What validation logged of it.
        params: Parameters.
        size_bytes: The bytes of its weights, if saved alone.
    """

    def __init__(self, family: ModelFamily, known: Mapping[str, Any]) -> None:
        self._family = family
        self._known = known
        self._models: dict[str, Any] = {}
        self.name: str = known["name"]
        self.step: int = known["step"]
        self.metrics: dict[str, float] = known["metrics"]
        self.params: int = known["params"]
        self.size_bytes: int = known["size_bytes"]

    def __repr__(self) -> str:
        metric = "" if self.metric is None else f", {self._family.metric}={self.metric:.4g}"
        return f"Member({self.name!r}, step={self.step}, params={self.params}{metric})"

    @property
    def metric(self) -> float | None:
        """The family's validation metric of this member; None: not known."""
        return None if self._family.metric is None else self.metrics.get(self._family.metric)

    @property
    def costs(self) -> dict[str, dict[str, dict[str, float]]]:
        """What was measured: by device and shape (`"32x128"`) `latency_ms`, `flops` and `peak_memory_bytes`."""
        return self._known["costs"]

    @property
    def widths(self) -> list[dict[str, int]]:
        """The heads and feed-forward neurons that each layer has."""
        return structures.widths(self._known["structure"]["layers"])

    def model(self, device: str | torch.device | None = None, *, share: bool = True) -> Any:
        """Returns the model, in evaluation mode.

        Args:
            device: Where; None: the family's device.
            share: Weights that members have in common are in memory once, so the model is for inference only, and
                it is the same object at each call. False: a new model with weights of its own, which can be trained.
        """
        where = str(self._family.device if device is None else device)
        if not share:
            model = self._family.rebuild(self._known, where, share=False)
            return model.requires_grad_(True)
        if where not in self._models:
            self._models[where] = self._family.rebuild(self._known, where, share=True)
        return self._models[where]

    def release(self) -> None:
        """Forgets the models that were read; what a caller holds stays."""
        self._models.clear()

    def predict(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 32,
        max_new_tokens: int = 32,
        device: str | torch.device | None = None,
        progress: Progress | None = None,
    ) -> list[Prediction]:
        """Returns what the model says of texts: a label for each, or the continuation of a language model (greedy).

        Args:
            texts: The texts; one alone may be given as it is. What is over the length of training is cut off: the
                end, or for a language model the beginning.
            batch_size: Texts at once. They are sorted by length, so that little is padded.
            max_new_tokens: How far a language model goes on, in tokens.
            device: Where; None: the family's device.
            progress: Told how many more texts are done.

        Returns:
            A prediction for each text, in their order.

        Raises:
            ConfigurationError: The family has no tokenizer, or a size is out of its range.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} must be a whole number of at least 1, got {value!r}.")
        model = self.model(device)
        if self._family.task == "language_model":
            return self._continue(model, texts, batch_size, max_new_tokens, progress)
        found: list[Prediction] = []
        ids = self._family.encode(texts)
        for row in class_logits(model, ids, self._family.pad_id, batch_size=batch_size, progress=progress).softmax(-1):
            found.append(prediction(row, self._family.labels, self.name))
        return found

    @torch.no_grad()
    def _continue(
        self, model: Any, texts: list[str], batch_size: int, count: int, progress: Progress | None
    ) -> list[Prediction]:
        family = self._family
        room = family.max_length - count
        if room < 1:
            raise ConfigurationError(
                f"max_new_tokens must be below {family.max_length}, the tokens the model was trained on, got {count}."
            )
        ids = [each[-room:] for each in family.encode(texts)]
        outputs = [""] * len(ids)
        for batch in batches_by_length(ids, batch_size):
            rows = [ids[index] for index in batch]
            inputs = {name: value.flip(1) for name, value in pad([row.flip(0) for row in rows], family.pad_id).items()}
            inputs = {name: value.to(next(model.parameters()).device) for name, value in inputs.items()}
            made = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=family.pad_id)
            width = inputs["input_ids"].shape[1]
            for index, row in zip(batch, made, strict=True):
                outputs[index] = family.tokenizer.decode(row[width:], skip_special_tokens=True)
            if progress is not None:
                progress(len(batch))
        return [Prediction(output=output, member=self.name) for output in outputs]


def prediction(probabilities: Tensor, labels: Sequence[str], member: str) -> Prediction:
    """Returns the prediction for one text, given the probabilities of the classes, shape (classes,).

    Without labels, classes are called by their numbers.
    """
    values = probabilities.tolist()
    labels = labels or [str(index) for index in range(len(values))]
    best = max(range(len(values)), key=values.__getitem__)
    return Prediction(
        output=labels[best], confidence=values[best], scores=dict(zip(labels, values, strict=True)), member=member
    )


def batches_by_length(ids: Sequence[Tensor], batch_size: int) -> Iterable[list[int]]:
    """Yields the indices of texts in batches of like length, the longest first: what does not fit fails at once."""
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad(rows: Sequence[Tensor], pad_id: int) -> dict[str, Tensor]:
    """Returns `input_ids` and `attention_mask` of shape (texts, longest), int64, padded on the right."""
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    return {"input_ids": ids.long(), "attention_mask": mask}


@torch.no_grad()
def class_logits(
    model: Any, ids: Sequence[Tensor], pad_id: int, *, batch_size: int, progress: Progress | None = None
) -> Tensor:
    """Returns a classifier's logits, float32 on the CPU, shape (texts, classes), in the order of `ids`.

    Args:
        model: The model, in evaluation mode.
        ids: The token ids of each text.
        pad_id: The id to pad with.
        batch_size: Texts at once.
        progress: Told how many more texts are done.
    """
    device = next(model.parameters()).device
    order: list[int] = []
    parts: list[Tensor] = []
    for batch in batches_by_length(ids, batch_size):
        inputs = pad([ids[index] for index in batch], pad_id)
        parts.append(model(**{name: value.to(device) for name, value in inputs.items()}).logits.float().cpu())
        order += batch
        if progress is not None:
            progress(len(batch))
    return torch.cat(parts)[torch.tensor(order).argsort()] if parts else torch.empty(0, 0)
