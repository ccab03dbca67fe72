"""Every callback, set so that it truly acts within a short run. A callback that is missing here fails the suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import adaptrain
from tests.toys import tiny_bert


@dataclass(frozen=True)
class Setting:
    """One callback under contract.

    Args:
        name: Its public name in `adaptrain`.
        yaml: Its file in conf/callbacks, without the suffix.
        arguments: Constructor arguments under which it acts in 18 steps of the toy run.
        wrong: Arguments that must be refused, each with a part of the message expected.
        knobs: The knobs it must have moved in the toy run.
        has_dry_run: Whether it takes decisions at all.
    """

    name: str
    yaml: str
    arguments: Mapping[str, Any]
    wrong: tuple[tuple[Mapping[str, Any], str], ...]
    knobs: frozenset[str] = frozenset()
    has_dry_run: bool = True

    def build(self, **changes: Any) -> Any:
        return getattr(adaptrain, self.name)(**(dict(self.arguments) | changes))


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "BatchSizeController",
            "batch_size",
            {"micro_batch_size": 3},
            (
                ({"micro_batch_size": 0}, "micro_batch_size"),
                ({"micro_batch_size": "big"}, "micro_batch_size"),
                ({"split_by": "words"}, "split_by"),
                ({"weight_by": "words"}, "weight_by"),
                ({"memory_fraction": 1.5}, "memory_fraction"),
                ({"memory_limit_gib": -1}, "memory_limit_gib"),
                ({"global_batch_size": 0}, "global_batch_size"),
                ({"global_batch_size": "large"}, "global_batch_size"),
                ({"overlap": "yes"}, "overlap"),
            ),
        ),
        Setting(
            "LearningRateController",
            "learning_rate",
            {},
            (
                ({"batch_scaling": "cubic"}, "batch_scaling"),
                ({"plateau": "sometimes"}, "plateau"),
            ),
            frozenset({"learning_rate"}),
        ),
        Setting(
            "ProgressivePruning",
            "pruning",
            {"target": {"flops": 0.6}, "schedule": adaptrain.CubicSchedule(begin=0.2, end=0.7, events=2)},
            (
                ({"target": {"latency": 1.7}}, "latency"),
                ({"target": {"speed": 0.5}}, "speed"),
                ({"importance": "luck"}, "importance"),
                ({"uniform": "yes"}, "uniform"),
                ({"groups": ("heads", "wheels")}, "wheels"),
            ),
            frozenset({"structure"}),
        ),
        Setting(
            "WeightPruning",
            "weight_pruning",
            {"sparsity": 0.5, "schedule": adaptrain.CubicSchedule(begin=0.2, end=0.7, events=2)},
            (
                ({"sparsity": 1.5}, "sparsity"),
                ({"sparsity": None}, "sparsity"),
                ({"granularity": "4:2", "sparsity": None}, "4:2"),
                ({"granularity": "2:4"}, "leave out sparsity"),
                ({"granularity": "block"}, "block"),
            ),
            frozenset({"weight_sparsity"}),
        ),
        Setting(
            "Distillation",
            "distillation",
            {"teacher": tiny_bert(ffn=96), "hidden": True},
            (
                ({"teacher": ""}, "teacher"),
                ({"temperature": 0}, "temperature"),
                ({"weight": 1.5}, "weight"),
                ({"every": 0}, "every"),
                ({"cache_mib": -1}, "cache_mib"),
            ),
            frozenset({"distillation"}),
        ),
        Setting(
            "Quantization",
            "quantization",
            {"method": "int8_weight", "latency_input": (4, 16)},
            (
                ({"method": "int3"}, "int3"),
                ({"max_metric_drop": -1}, "max_metric_drop"),
                ({"minimize": "joy"}, "minimize"),
                ({"monitor": "val/something"}, "val/something"),
                ({"latency_input": (0, 16)}, "latency_input"),
            ),
            frozenset({"precision"}),
        ),
        Setting(
            "LayerFreezing",
            "freezing",
            {"by": "schedule", "begin": 0.1, "end": 0.6, "window": 3},
            (
                ({"by": "chance"}, "chance"),
                ({"most": 1}, "most"),
                ({"begin": 0.5, "end": 0.5}, "end"),
                ({"begin": -1}, "begin"),
                ({"every": 1}, "every"),
                ({"window": 1}, "window"),
            ),
            frozenset({"frozen_layers"}),
        ),
        Setting(
            "LowRankAdapters",
            "adapters",
            {"target": {"trainable_params": 0.3}, "samples": 16},
            (
                ({"target": {"rank": 4}}, "rank"),
                ({"target": {"trainable_params": 2}}, "trainable_params"),
                ({"target": {"trainable_params_m": -1}}, "trainable_params_m"),
                ({"importance": "luck"}, "luck"),
                ({"max_rank": 0}, "max_rank"),
                ({"scale": 0}, "scale"),
                ({"samples": 0}, "samples"),
            ),
            frozenset({"trainable_params"}),
        ),
        Setting(
            "WeightSoup",
            "soup",
            {},
            (
                ({"keep": 0}, "keep"),
                ({"method": "minestrone"}, "minestrone"),
                ({"monitor": 7}, "monitor"),
                ({"monitor": "val/something"}, "val/something"),
                ({"mode": "best"}, "mode"),
                ({"begin": 1}, "begin"),
            ),
        ),
        Setting(
            "ElasticTraining",
            "elastic",
            {"levels": (0.8, 0.6), "cost": "flops", "begin": 0.2},
            (
                ({"levels": 1.5}, "levels"),
                ({"levels": ()}, "levels"),
                ({"cost": "money"}, "cost"),
                ({"begin": 1}, "begin"),
                ({"importance": "luck"}, "importance"),
                ({"latency_input": (4,)}, "latency_input"),
                ({"seed": "x"}, "seed"),
            ),
            frozenset({"elastic"}),
        ),
        Setting(
            "FamilyCheckpoint",
            "family",
            {"latency_input": (4, 16)},
            (
                ({"latency_input": (0, 16)}, "latency_input"),
                ({"latency_input": {"one": 3}}, "latency_input"),
                ({"monitor": 7}, "monitor"),
                ({"monitor": "val/something"}, "val/something"),
                ({"mode": "best"}, "mode"),
                ({"recovery_steps": 1.5}, "recovery_steps"),
                ({"recovery_teacher": "final"}, "recovery_teacher"),
                ({"validation_samples": -1}, "validation_samples"),
            ),
            frozenset({"family"}),
        ),
        Setting(
            "ResourceMonitor", "monitor", {"interval_s": 0.05}, (({"interval_s": 0}, "interval_s"),), has_dry_run=False
        ),
        Setting("WallClock", "wall_clock", {"minutes": 60}, (({"minutes": 0}, "minutes"),)),
        Setting("RandomState", "random_state", {}, (), has_dry_run=False),
        Setting("GracefulStop", "graceful_stop", {}, (), has_dry_run=False),
    )
}
