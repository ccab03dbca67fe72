"""Resource-aware training for PyTorch Lightning.

State a budget; while the model trains, callbacks adapt its structure, the batch size and the learning rate, and
record why. Names are imported when first used, so `import adaptrain` costs milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptrain._lazy import lazily

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adaptrain import compression as compression
    from adaptrain import fusion as fusion
    from adaptrain.budget import Budget as Budget
    from adaptrain.budget import Progress as Progress
    from adaptrain.callbacks.adapters import LowRankAdapters as LowRankAdapters
    from adaptrain.callbacks.base import AdaptiveCallback as AdaptiveCallback
    from adaptrain.callbacks.batch_size import BatchSizeController as BatchSizeController
    from adaptrain.callbacks.distillation import Distillation as Distillation
    from adaptrain.callbacks.elastic import ElasticTraining as ElasticTraining
    from adaptrain.callbacks.family import FamilyCheckpoint as FamilyCheckpoint
    from adaptrain.callbacks.freezing import LayerFreezing as LayerFreezing
    from adaptrain.callbacks.graceful_stop import GracefulStop as GracefulStop
    from adaptrain.callbacks.learning_rate import LearningRateController as LearningRateController
    from adaptrain.callbacks.monitor import ResourceMonitor as ResourceMonitor
    from adaptrain.callbacks.pruning import ProgressivePruning as ProgressivePruning
    from adaptrain.callbacks.quantization import Quantization as Quantization
    from adaptrain.callbacks.random_state import RandomState as RandomState
    from adaptrain.callbacks.soup import WeightSoup as WeightSoup
    from adaptrain.callbacks.wall_clock import WallClock as WallClock
    from adaptrain.callbacks.weight_pruning import WeightPruning as WeightPruning
    from adaptrain.decisions import Decision as Decision
    from adaptrain.decisions import DecisionLog as DecisionLog
    from adaptrain.errors import ConfigurationError as ConfigurationError
    from adaptrain.family.model_family import ModelFamily as ModelFamily
    from adaptrain.policies.global_batch_size import BatchSizeRamp as BatchSizeRamp
    from adaptrain.policies.noise_scale import GradientNoiseScale as GradientNoiseScale
    from adaptrain.policies.sparsity import CosineSchedule as CosineSchedule
    from adaptrain.policies.sparsity import CubicSchedule as CubicSchedule
    from adaptrain.policies.sparsity import LinearSchedule as LinearSchedule
    from adaptrain.policies.sparsity import OneShotSchedule as OneShotSchedule
    from adaptrain.pruning.checkpoint import load_from_checkpoint as load_from_checkpoint
    from adaptrain.resources import ResourceSnapshot as ResourceSnapshot

_NAMES = {
    "AdaptiveCallback": "adaptrain.callbacks.base",
    "BatchSizeController": "adaptrain.callbacks.batch_size",
    "BatchSizeRamp": "adaptrain.policies.global_batch_size",
    "Budget": "adaptrain.budget",
    "ConfigurationError": "adaptrain.errors",
    "CosineSchedule": "adaptrain.policies.sparsity",
    "CubicSchedule": "adaptrain.policies.sparsity",
    "Decision": "adaptrain.decisions",
    "DecisionLog": "adaptrain.decisions",
    "Distillation": "adaptrain.callbacks.distillation",
    "ElasticTraining": "adaptrain.callbacks.elastic",
    "FamilyCheckpoint": "adaptrain.callbacks.family",
    "GracefulStop": "adaptrain.callbacks.graceful_stop",
    "GradientNoiseScale": "adaptrain.policies.noise_scale",
    "LayerFreezing": "adaptrain.callbacks.freezing",
    "LearningRateController": "adaptrain.callbacks.learning_rate",
    "LinearSchedule": "adaptrain.policies.sparsity",
    "LowRankAdapters": "adaptrain.callbacks.adapters",
    "ModelFamily": "adaptrain.family.model_family",
    "OneShotSchedule": "adaptrain.policies.sparsity",
    "Progress": "adaptrain.budget",
    "ProgressivePruning": "adaptrain.callbacks.pruning",
    "Quantization": "adaptrain.callbacks.quantization",
    "RandomState": "adaptrain.callbacks.random_state",
    "ResourceMonitor": "adaptrain.callbacks.monitor",
    "ResourceSnapshot": "adaptrain.resources",
    "WallClock": "adaptrain.callbacks.wall_clock",
    "WeightPruning": "adaptrain.callbacks.weight_pruning",
    "WeightSoup": "adaptrain.callbacks.soup",
    "load_from_checkpoint": "adaptrain.pruning.checkpoint",
}

_PACKAGES = ("compression", "fusion")

__all__ = ["__version__", *_NAMES, *_PACKAGES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazily(__name__, _NAMES, packages=_PACKAGES)
