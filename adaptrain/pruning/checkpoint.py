"""Loading checkpoints of pruned models: the shapes first, then the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from torch.optim.swa_utils import AveragedModel

from adaptrain.errors import ConfigurationError
from adaptrain.execution import adapters
from adaptrain.pruning import structure as structures
from adaptrain.pruning.families import find_family
from adaptrain.pruning.surgery import resize

CHECKPOINT_KEY = "adaptrain_structure"

Module = TypeVar("Module")


def replay(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Gives a module's model the shapes, and the adapters, that a checkpoint's weights have; its own weights are lost.

    Args:
        module: A module, or a model; dense, or pruned in any way.
        checkpoint: The checkpoint. One without a structure holds dense weights.

    Raises:
        ConfigurationError: The structure is of another architecture.
    """
    for average in module.modules():
        if isinstance(average, AveragedModel):  # of the model, kept beside it
            replay(average.module, checkpoint)
    adapters.replay_adapters(module, checkpoint.get(adapters.CHECKPOINT_KEY))
    saved = checkpoint.get(CHECKPOINT_KEY)
    if saved is None and not any(map(structures.is_pruned, module.modules())):
        return
    match = find_family(module)
    if saved is None:
        wanted = structures.dense(match)
    else:
        structures.check_record(match, saved)
        wanted = structures.copy_of(saved["layers"])
    if wanted != structures.current(match):
        resize(match, wanted)


def load_from_checkpoint(module_class: type[Module], path: str | os.PathLike[str], **kwargs: Any) -> Module:
    """Loads a LightningModule from a checkpoint of a run that pruned it, or trained adapters, without a trainer.

    Like Lightning's `ModuleClass.load_from_checkpoint`, which fails on a pruned model because it builds it dense; a
    checkpoint of a dense model loads as well. Adapters are merged into the weights.

    Args:
        module_class: The LightningModule's class.
        path: The checkpoint.
        **kwargs: Passed on: arguments of the module, `map_location`, `strict`, `weights_only`.

    Returns:
        The module with the checkpoint's shapes and weights.

    Raises:
        ConfigurationError: `module_class` is not the class of a LightningModule, or the checkpoint holds another
            architecture; the message says what differs.
    """
    if not hasattr(module_class, "load_from_checkpoint") or not isinstance(module_class, type):
        raise ConfigurationError(
            "adaptrain.load_from_checkpoint takes the class of the LightningModule that was trained, such as"
            f" MyModule; got {module_class!r}."
        )

    class Replaying(module_class):  # type: ignore[misc, valid-type]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            replay(self, checkpoint)
            super().on_load_checkpoint(checkpoint)  # type: ignore[misc]

    module = Replaying.load_from_checkpoint(path, **kwargs)  # type: ignore[attr-defined]
    module.__class__ = module_class
    adapters.merge_adapters(module)
    return module
