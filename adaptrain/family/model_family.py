"""The members that one pruned run left, and the choice among them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from adaptrain.errors import ConfigurationError
from adaptrain.family.measure import measure_costs, shape_key
from adaptrain.family.member import Member
from adaptrain.family.select import Candidate, select
from adaptrain.family.store import FOLDER, TOKENIZER, FamilyStore
from adaptrain.resources.device import device_name, read_device

if TYPE_CHECKING:
    from adaptrain.family.cascade import Cascade

_log = logging.getLogger(__name__)


class ModelFamily:
    """The models that a run with `FamilyCheckpoint` left: from the dense one to the smallest, each measured.

        family = ModelFamily.load("runs/model_family/2026-01-31_12-00-00")
        member = family.select(latency_ms=20)
        member.predict(["a text", "another one"])

    Weights are read when they are needed, and those that members have in common are on disk and in memory once.

    Args:
        store: Where the members are.
        device: Where models go and are measured; None: the kind of device they were trained on if there is one here,
            else the CPU.
        build: Builds the dense model, for one that is not of transformers.
    """

    def __init__(
        self,
        store: FamilyStore,
        *,
        device: str | torch.device | None = None,
        build: Callable[[], nn.Module] | None = None,
    ) -> None:
        about = store.about()
        self._store = store
        self._build = build
        self._loaded: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()
        self.folder = store.folder
        self.task: str = about["task"]
        self.labels: list[str] = about["labels"]
        self.metric: str | None = about["metric"]
        self.mode: str = about["mode"]
        self.max_length: int = about["max_length"]
        self.shapes: dict[str, tuple[int, int]] = {name: (b, s) for name, (b, s) in about["shapes"].items()}
        trained_on_gpu = about["device_type"] == "cuda" and torch.cuda.is_available()
        self.device = read_device(("cuda" if trained_on_gpu else "cpu") if device is None else device)
        self.members = [Member(self, known) for known in store.members()]
        if not self.members:
            raise ConfigurationError(
                f"The family in {store.folder} has no members yet: its run has not come to its first structural event."
            )

    @classmethod
    def load(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        build: Callable[[], nn.Module] | None = None,
    ) -> ModelFamily:
        """Opens the family of a run.

        Args:
            run_dir: The run's folder, or the family's own.
            device: Where models go and are measured; None: the kind of device they were trained on if there is one
                here, else the CPU.
            build: Builds the dense model, for one that is not of transformers.

        Raises:
            ConfigurationError: There is no such folder, it holds no family, or the device is not there.
        """
        folder = Path(run_dir)
        if not folder.is_dir():
            raise ConfigurationError(f"There is no folder {folder}. Give the folder of a run, such as runs/*/*.")
        inside = folder / FOLDER
        return cls(FamilyStore(inside if inside.is_dir() else folder), device=device, build=build)

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __getitem__(self, name: str) -> Member:
        for member in self.members:
            if member.name == name:
                return member
        known = ", ".join(member.name for member in self.members)
        raise ConfigurationError(f"The family has no member {name!r}. It has: {known}.")

    def measure(
        self,
        *,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        device: str | torch.device | None = None,
        again: bool = False,
    ) -> dict[str, dict[str, float]]:
        """Returns what the members cost at one shape on one device; measured now unless it was before.

        What is measured is kept with the family, where its folder can be written.

        Args:
            batch_size: Samples; None: as in the first of the family's shapes.
            sequence_length: Tokens of each; None: as in the first of the family's shapes.
            device: Where; None: the family's device.
            again: Measure even if it was measured before.

        Returns:
            By member: `latency_ms`, `flops` and `peak_memory_bytes`.

        Raises:
            ConfigurationError: A size is out of its range, or the device is not there.
        """
        where = self.device if device is None else read_device(device)
        shape = self._shape(batch_size, sequence_length)
        name, key = device_name(where), shape_key(shape)
        if again or any(key not in member.costs.get(name, {}) for member in self.members):
            others = {device for member in self.members for device in member.costs}
            _log.info(
                "Measuring %d models at %d samples of %d tokens on %s%s.",
                len(self),
                *shape,
                name,
                f"; they were measured on {', '.join(sorted(others))}" if others - {name} else "",
            )
            held = {member.name: member._models.get(str(where)) for member in self.members}
            found = measure_costs({member.name: member.model(where) for member in self.members}, shape)
            for member in self.members:
                if held[member.name] is None:
                    member._models.pop(str(where))
                member.costs.setdefault(name, {})[key] = found[member.name]
                self._note(member)
        return {member.name: member.costs[name][key] for member in self.members}

    def select(
        self,
        *,
        latency_ms: float | None = None,
        memory_mib: float | None = None,
        params_m: float | None = None,
        metric_at_least: float | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        device: str | torch.device | None = None,
    ) -> Member:
        """Returns the best member that meets every limit: by the validation metric, among equals the fastest.

        Latency and memory are as measured on `device` at the shape asked for; what was not measured there is now.

        Args:
            latency_ms: The most that a forward pass may take, in milliseconds.
            memory_mib: The most that weights and tensors of a forward pass may occupy, in MiB.
            params_m: The most parameters, in millions.
            metric_at_least: The least of the metric; of one where less is better, such as perplexity, the most.
            batch_size: Samples of the forward pass; None: as in the first of the family's shapes.
            sequence_length: Tokens of each; None: as in the first of the family's shapes.
            device: Where; None: the family's device.

        Raises:
            ConfigurationError: A limit is out of its range, or no member meets all: it says which limit and by how
                much.
        """
        given = {
            "latency_ms": latency_ms,
            "memory_mib": memory_mib,
            "params_m": params_m,
            "metric_at_least": metric_at_least,
        }
        limits = {name: value for name, value in given.items() if value is not None}
        for name, value in limits.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or math.isnan(value) or not (name == "metric_at_least" or value > 0):
                above = "" if name == "metric_at_least" else " greater than 0"
                raise ConfigurationError(f"{name} must be a number{above}, got {value!r}.")
        costs = self.measure(batch_size=batch_size, sequence_length=sequence_length, device=device)
        shape = self._shape(batch_size, sequence_length)
        where = device_name(self.device if device is None else read_device(device))
        chosen = select(
            [
                Candidate(
                    name=member.name,
                    metric=member.metric,
                    latency_ms=costs[member.name]["latency_ms"],
                    memory_mib=costs[member.name]["peak_memory_bytes"] / 2**20,
                    params_m=member.params / 1e6,
                )
                for member in self.members
            ],
            limits,
            metric=self.metric or "metric",
            mode="min" if self.mode == "min" else "max",
            at=f" at {shape[0]} x {shape[1]} tokens on {where}",
        )
        return self[chosen]

    def table(
        self,
        *,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        device: str | torch.device | None = None,
    ) -> Any:
        """Returns a rich renderable of the members, `print`-able too: metric, parameters, and what they cost.

        Args:
            batch_size: Samples to measure at; None: at every shape of the family.
            sequence_length: Tokens of each; None: as in the first of the family's shapes.
            device: Where; None: the family's device.
        """
        from adaptrain.family.table import FamilyTable

        shapes = [self._shape(batch_size, sequence_length)]
        if batch_size is None and sequence_length is None:
            shapes = list(self.shapes.values())
        costs = {s: self.measure(batch_size=s[0], sequence_length=s[1], device=device) for s in shapes}
        return FamilyTable(self, costs, device_name(self.device if device is None else read_device(device)))

    def cascade(
        self,
        cost: float | None = None,
        *,
        accuracy: float | None = None,
        small: str | None = None,
        large: str | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        data: tuple[Sequence[str], Sequence[str]] | None = None,
        again: bool = False,
    ) -> Cascade:
        """Returns a small member that answers, together with a larger one where it is unsure.

        Of all pairs of a member and a slower one that makes it better, it is the pair that finds the right classes
        likeliest at the cost, or the least cost at the accuracy. Temperatures, weight and threshold are chosen on one
        half of the validation samples that the run kept; on the other half the cascade is judged and timed beside all
        members (`cascade.report`, which says so where one of them alone is as good). What comes of it is kept with the
        family.

            cascade = family.cascade(cost=0.5)
            print(cascade.report)
            cascade.predict(["a text", "another one"])

        Args:
            cost: The time it may take, as a fraction of the slowest member's (the dense one), above 0; 0.5 where
                `accuracy` is not given.
            accuracy: Instead of a cost: the accuracy to reach on validation, in (0, 1], at the least cost.
            small: The member that answers first; None: chosen.
            large: The member that is asked too where the first is unsure; None: chosen.
            batch_size: Texts at once.
            device: Where; None: the family's device.
            data: Texts and their labels to choose and judge on; None: validation samples of the run.
            again: Choose and measure even if it was done before.

        Raises:
            ConfigurationError: An argument is out of its range, there are no labelled samples, no cascade can meet
                what is asked (it says by how much), or no slower member makes a faster one better.
        """
        from adaptrain.family.cascade_request import CascadeRequest

        self._shape(batch_size, None)
        request = CascadeRequest(cost=cost, accuracy=accuracy, small=small, large=large, batch_size=batch_size)
        where = self.device if device is None else read_device(device)
        return request.serve(self, where, data=data, again=again)

    def rebuild(self, known: Mapping[str, Any], device: str | torch.device, *, share: bool) -> Any:
        """Returns the model of a member; see `Member.model`."""
        loaded = self._loaded if share else None
        return self._store.rebuild(known, device=device, build=self._build, loaded=loaded)

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer of the run.

        Raises:
            ConfigurationError: The run had none that could be saved.
        """
        folder = self.folder / TOKENIZER
        if not folder.is_dir():
            raise ConfigurationError(
                f"The family in {self.folder} has no tokenizer, so it cannot read text. Give FamilyCheckpoint a data"
                " module with a tokenizer, or use member.model() on token ids of your own."
            )
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder))

    @property
    def pad_id(self) -> int:
        """The id that batches are padded with."""
        if not (self.folder / TOKENIZER).is_dir():
            return 0  # what is padded is masked
        tokenizer = self.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Returns the token ids of texts as the run's data had them, each of shape (tokens,).

        Raises:
            ConfigurationError: A text is empty and the model is to go on from it.
        """
        if not texts:
            return []
        if self.task == "language_model":
            found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            first = [i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None][:1]
            found = [ids or first for ids in found]
        else:
            found = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return [torch.tensor(ids) for ids in found]

    @property
    def fingerprint(self) -> list[list[str]]:
        """Every weight of every member, told by its content."""
        return [[place["hash"] for place in member._known["weights"].values()] for member in self.members]

    def _shape(self, batch_size: int | None, sequence_length: int | None) -> tuple[int, int]:
        default = next(iter(self.shapes.values()))
        for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name} must be a whole number of at least 1, got {value!r}.")
        return batch_size or default[0], sequence_length or default[1]

    def _note(self, member: Member) -> None:
        try:
            self._store.update(member.name, costs=member.costs)
        except OSError:  # a family that others share, on a disk that this user cannot write
            _log.debug("What was measured cannot be kept in %s.", self.folder)
