"""Bringing one model to its target: what is allowed when, which structure that means, and what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

from torch import nn

from adaptrain.errors import ConfigurationError
from adaptrain.execution.oom import attempt, weights_on_host
from adaptrain.pruning import cost
from adaptrain.pruning import structure as structures
from adaptrain.pruning.cost_table import CostTable, measuring_twin, with_structure
from adaptrain.pruning.family import Match
from adaptrain.pruning.importance import Scores
from adaptrain.pruning.latency_search import FITS, Candidate, LatencySearch
from adaptrain.pruning.layers import solve_with_layers
from adaptrain.pruning.plain import uniform_kinds, uniform_widths
from adaptrain.pruning.solver import solve
from adaptrain.pruning.structure import Structure
from adaptrain.pruning.target import absolute_limits, cost_name, in_given_unit

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")

_ROOM = 1.1  # times a latency limit: what is left for the last event to cut by measurement, as far as the table tells
_MOST = 20  # measurements of the final model, where a limit seems not to be met
_FEW = 2  # measurements of the final model, where no limit depends on them
_SLOW = 1000.0  # milliseconds: a forward that takes longer is then timed once
_PAUSE = 0.5  # seconds before each of them beyond the usual: what keeps the machine busy now may be over then
_UNIT_NAMES = {"heads": "heads", "ffn": "FFN neurons"}


class Pruner:
    """Decides the structure of one model under one target.

    Args:
        match: The model.
        kinds: The kinds of units that may go, `"heads"` and `"ffn"`, and `"layers"` where whole layers may.
        target: The limits as `read_target` returns them.
        round_to: The multiple that widths are kept to: `"auto"`, one number for FFN widths, or one by kind.
        uniform: Whether all layers stay equally wide, in shapes that a Hugging Face config can describe; kinds for
            which it cannot are left out.

    Raises:
        ConfigurationError: `uniform` leaves nothing that may go.
    """

    def __init__(
        self,
        match: Match,
        kinds: tuple[str, ...],
        target: Mapping[str, float],
        round_to: str | int | Mapping[str, int],
        *,
        uniform: bool = False,
    ) -> None:
        self.match = match
        kinds = uniform_kinds(match, kinds) if uniform else kinds
        self.kinds = tuple(kind for kind in kinds if kind != "layers")
        self.layers = "layers" in kinds
        self.target = dict(target)
        self.table: CostTable | None = None
        self.round_to = _round_to(match, round_to)
        self.uniform = {kind: uniform_widths(match, kind, self.round_to[kind]) for kind in self.kinds if uniform}

    @property
    def measures(self) -> bool:
        """Whether latency is limited, so that models are built and timed."""
        return any(cost_name(name) == "latency" for name in self.target)

    def build_table(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Computes and measures what structures cost at a (batch, sequence), as plain Python for `use_table`.

        Raises:
            ConfigurationError: There is no memory for a dense model to measure, beside the one that trains.
        """

        def build() -> CostTable:
            return CostTable.build(self.match, self.kinds, shape, latency=self.measures, layers=self.layers)

        if not self.measures:
            return build().state
        table, lack = attempt(build, host_bytes=weights_on_host(self.match.model))
        if table is None:
            raise ConfigurationError(
                f"There is no memory to measure latency, for which a dense model is built beside yours: {lack}."
                " Limit params, flops or memory, which are computed; or measure at a smaller"
                f" latency_input=(batch, sequence) than {shape[0]} x {shape[1]}, or in a lower precision."
            )
        return table.state

    def use_table(self, state: Mapping[str, Any]) -> None:
        """Takes a cost table.

        Raises:
            ConfigurationError: Even the smallest structure exceeds a limit; it says what the least is.
        """
        self.table = CostTable(state)
        dense, least = self.table.dense, self.table.least
        if self.uniform:  # a config describes no layer without heads or neurons
            floor = {kind: widths[0] for kind, widths in self.uniform.items() if widths}
            least = self.table.total([{**layer, **floor} for layer in self.table.dense_widths])
        for name, value in self.target.items():
            possible = in_given_unit(name, least[cost_name(name)], dense[cost_name(name)])
            if possible > value:
                gone = " and ".join(_UNIT_NAMES[kind] for kind in self.kinds)
                gone = f"as many {gone} removed as uniform layers allow" if self.uniform else f"all {gone} removed"
                needs = f"{possible:.2g} of the dense model's {name}" if name == cost_name(name) else f"{possible:.3g}"
                raise ConfigurationError(
                    f"budget.{name}={value:g} cannot be met: with {gone} the model still needs {needs}."
                    " Raise the limit, allow more groups, or start from a smaller model."
                )

    def limits(self, share: float) -> dict[str, float]:
        """Returns the absolute limits once `share` in [0, 1] of the whole reduction is due.

        Before the last event a tenth stays of a latency limit: until then only the table says what a structure takes,
        which may be off by that much, and nothing that was cut comes back.
        """
        assert self.table is not None
        dense = self.table.dense
        final = absolute_limits(self.target, dense)
        due = {name: dense[name] - share * (dense[name] - limit) for name, limit in final.items()}
        if share < 1 and "latency" in final:
            due["latency"] = max(due["latency"], min(dense["latency"], _ROOM * final["latency"]))
        return due

    def propose(self, structure: Structure, scores: Scores, share: float) -> Structure:
        """Returns the structure to have at `share` of the reduction, by the table.

        Args:
            structure: What is left now.
            scores: What each unit is worth.
            share: The share of the whole reduction that is due.
        """
        assert self.table is not None
        return self._solve(structure, scores, self.limits(share))

    def settle(self, structure: Structure, scores: Scores) -> tuple[Structure, float | None]:
        """Returns the final structure, and its measured latency as a fraction of the dense model's.

        Where latency is limited, the candidate is measured against the dense model, and cut more or less until the
        measured value is at the limit: what a table interpolates and adds up is not quite what a model takes
        (`LatencySearch`).

        Without memory for that, as a warning says, the table decides, and nothing is measured.

        Args:
            structure: What is left now.
            scores: What each unit is worth.
        """
        limits = self.limits(1.0)
        if not self.measures:
            return self._solve(structure, scores, limits), None
        _log.info("Measuring structures beside the dense model, to meet the latency that was asked for.")
        found, lack = self._with_room(lambda: self._search(structure, scores, limits))
        if found is None:
            _log.warning("There is no memory to measure structures (%s): what goes is decided by the cost table.", lack)
            return self._solve(structure, scores, limits), None
        return found

    def _search(
        self, structure: Structure, scores: Scores, limits: Mapping[str, float]
    ) -> tuple[Structure, float | None]:
        assert self.table is not None
        repeats, twin = cost.repeats_for(self.table.dense["latency"]) // cost.COPIES, measuring_twin(self.match)
        search, tried, last = LatencySearch(), dict[Candidate, tuple[Structure, float]](), structure
        while (aim := search.next_aim()) is not None:
            wanted = self._solve(structure, scores, {**limits, "latency": aim * limits["latency"]})
            total = self.table.total(structures.widths(wanted))["latency"]
            candidate = search.add(aim, self._used({"final": total, "dense": self.table.dense["latency"]}))
            model, times = with_structure(twin, wanted), []
            while not search.is_decided(candidate):
                times.append(self._beside(twin, model, repeats))
                candidate.measured.append(self._used(times[-1]))
            mean = _mean(times)
            tried[candidate] = wanted, mean["final"] / mean["dense"]
            if wanted == last and search.used(candidate) <= FITS:
                break  # there is no slower one, or another limit binds
            last = wanted
        best = search.best()
        chosen, latency = tried[best]
        return chosen, latency * search.used(best) / fmean(best.measured)  # with what others tell of it

    def _beside(self, twin: Match, final: nn.Module, repeats: int) -> dict[str, float]:
        """Returns milliseconds, in turns, of copies of the dense twin and of another model."""
        models = {"dense": twin.model, "final": final}
        return cost.measure_latency(models, self._inputs(twin), repeats=repeats, copies=1)

    def _used(self, times: Mapping[str, float]) -> float:
        """Returns the largest share of a latency limit that is used."""
        return max(
            in_given_unit(name, times["final"], times["dense"]) / value
            for name, value in self.target.items()
            if cost_name(name) == "latency"
        )

    def _solve(self, structure: Structure, scores: Scores, limits: Mapping[str, float]) -> Structure:
        table = self.table
        assert table is not None

        def cut(start: Structure) -> Structure:
            return solve(start, scores, table, limits, self.round_to, self.uniform)

        return solve_with_layers(structure, scores, table, limits, cut) if self.layers else cut(structure)

    def report(self) -> dict[str, Any]:
        """Measures the model against a dense one.

        On a CPU it is copies of both that are timed: where this process has put the model says nothing about where one
        will lie that is loaded from a file. Without memory for that, as a warning says, latencies are None, and a limit
        on latency is judged by the table.

        Returns:
            `dense` and `final` with `params`, `flops`, `latency_ms` and `size_bytes`; `latency_input`; `constraints`,
            each with `name`, `limit`, `value` and `met`.
        """
        assert self.table is not None
        _log.info("Measuring the final model beside the dense one.")
        times, lack = self._with_room(self._measure)
        if times is None:
            judged = " Whether the limit is met is told by the cost table." if self.measures else ""
            _log.warning("There is no memory to measure the final model's latency (%s).%s", lack, judged)
        report: dict[str, Any] = {
            "latency_input": list(self.table.state["shape"]),
            "constraints": self._constraints(times or {}),
        }
        inputs = self._inputs(self.match)
        for name, model in {"dense": self.match.hollow_twin(), "final": self.match.model}.items():
            report[name] = {
                "params": cost.count_params(model),
                "flops": cost.count_flops(model, inputs),
                "latency_ms": None if times is None else times[name],
                "size_bytes": cost.size_on_disk_bytes(model),
            }
        return report

    def _measure(self) -> dict[str, float]:
        """Returns the milliseconds of `dense` and `final`, measured until it is clear that a limit is not met."""
        assert self.table is not None
        twin = measuring_twin(self.match)
        # Not the model itself, which may carry hooks and all that they reach.
        final = with_structure(twin, structures.current(self.match))
        rough = self.table.dense.get("latency")
        if rough is None:  # it is not limited, and was not measured yet
            once = cost.measure_latency({"dense": twin.model, "final": final}, self._inputs(twin), repeats=1)
            rough = once["dense"]
            if rough > _SLOW:
                return once
        repeats = cost.repeats_for(rough) // cost.COPIES
        copies = cost.COPIES if self.measures else _FEW
        measured = [self._beside(twin, final, repeats) for _ in range(copies)]
        # A difference of a percent needs more of them.
        while len(measured) < _MOST and not self._latency_met(_mean(measured)):
            time.sleep(_PAUSE)
            measured.append(self._beside(twin, final, repeats))
        return _mean(measured)

    def _latency_met(self, times: Mapping[str, float]) -> bool:
        return all(each["met"] for each in self._constraints(times) if cost_name(each["name"]) == "latency")

    def _constraints(self, times: Mapping[str, float]) -> list[dict[str, Any]]:
        assert self.table is not None
        dense, final = dict(self.table.dense), self.table.total(structures.current_widths(self.match))
        if times:
            dense["latency"], final["latency"] = times["dense"], times["final"]
        found = []
        for name, limit in self.target.items():
            value = in_given_unit(name, final[cost_name(name)], dense[cost_name(name)])
            found.append({"name": name, "limit": limit, "value": value, "met": value <= limit})
        return found

    def _with_room(self, run: Callable[[], _Found]) -> tuple[_Found | None, str | None]:
        """Runs what measures this model beside the dense one; None where there is no memory for that, and why."""
        assert self.table is not None
        dense, fixed = self.table.dense["params"], self.table.state["fixed"]["params"]
        here = self.table.total(structures.current_widths(self.match))["params"]
        # Of both all but what they share with the model; where a limit depends on it, on a CPU a copy of each as well.
        share = (1 + self.measures) * (dense + here - 2 * fixed) / here
        return attempt(run, host_bytes=int(share * weights_on_host(self.match.model)))

    def _inputs(self, match: Match) -> dict[str, Any]:
        assert self.table is not None
        batch, sequence = self.table.state["shape"]
        return match.example_inputs(batch, sequence)


def _mean(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(each[name] for each in measured) for name in measured[0]}


def _round_to(match: Match, given: str | int | Mapping[str, int]) -> dict[str, int]:
    """Returns the multiple of each kind's widths: 1 for heads; for FFN what the device's matrix kernels like."""
    if isinstance(given, Mapping):
        return {"heads": int(given.get("heads", 1)), "ffn": int(given.get("ffn", 8))}
    if isinstance(given, int):
        return {"heads": 1, "ffn": given}
    widest = max(layer["ffn"] for layer in structures.dimensions(match))
    kernel = 64 if next(match.model.parameters()).device.type == "cuda" and widest >= 512 else 8
    # About 64 steps or fewer for a wide layer: finer ones cost the solver time and buy nothing.
    return {"heads": 1, "ffn": max(1, min(kernel, widest // 8), widest // 64 // kernel * kernel)}
