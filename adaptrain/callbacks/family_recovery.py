"""Finishes the training of a family's members: more steps each, taught by the best of them where that is asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from adaptrain._lightning.nested import nested_trainer
from adaptrain.callbacks.after_training import controllers_like, validate_again
from adaptrain.callbacks.distillation import Distillation
from adaptrain.errors import ConfigurationError
from adaptrain.family.metric import finite, is_better
from adaptrain.family.store import FamilyStore
from adaptrain.pruning.families import find_family

_log = logging.getLogger(__name__)

FOLDER = "recovery"  # in a family's folder: what the callbacks decided meanwhile


def check_recovery(trainer: Any, pl_module: Any, *, taught: bool) -> None:
    """Refuses, before training, what cannot be trained once more.

    Raises:
        ConfigurationError: There are several ranks, or the model is to be taught and has no logits.
    """
    if trainer.world_size > 1:
        raise ConfigurationError(
            f"FamilyCheckpoint(recovery_steps=...) trains in one process, but there are {trainer.world_size}. Set"
            " devices=1, or recovery_steps=0."
        )
    if taught:
        Distillation().check(trainer, pl_module)


def recover(
    trainer: Any,
    pl_module: Any,
    store: FamilyStore,
    *,
    steps: int,
    become: Callable[[dict[str, Any]], None],
    teacher: Callable[[dict[str, Any]], nn.Module] | None,
) -> None:
    """Trains every member but the best for some steps, and keeps what got better.

    The larger come first: one that becomes better than the best so far teaches those that follow. A member's training
    is the module's own, with a whole schedule of `steps`; what is done is noted at once, so that a run that is killed
    goes on with the next.

    Args:
        trainer: The trainer, which has trained; call it in `teardown`.
        pl_module: Its module, which is left with another member's structure and weights.
        store: The family, its members validated.
        steps: Optimizer steps for each.
        become: Gives the live module a member's structure and weights.
        teacher: Returns the model of the best one, which teaches them; None: nothing teaches.
    """
    about = store.about()
    metric, mode = about["metric"], about["mode"]
    if any(metric not in member["metrics"] for member in store.members()):
        _log.warning("The members of the family have no metric in common, so none is recovered.")
        return
    sign = 1 if mode == "min" else -1
    # Of those that tie the one that needed no recovery.
    best = min(store.members(), key=lambda member: (member["metrics"][metric] * sign, "recovery" in member))["name"]
    for name in [member["name"] for member in sorted(store.members(), key=lambda member: -member["params"])]:
        members = {member["name"]: member for member in store.members()}
        member = members[name]
        if name == best or "recovery" in member:
            continue
        before = member["metrics"][metric]
        became, seconds = None, 0.0
        try:
            become(member)
            began = time.monotonic()
            _train(trainer, pl_module, teacher and teacher(members[best]), steps, store.folder / FOLDER / name)
            seconds = time.monotonic() - began
            became = finite(validate_again(trainer, pl_module))
        except Exception as error:  # the user's own hooks may fail in a second trainer; training itself was fine
            _log.warning("The member %r could not be recovered: %s: %s", name, type(error).__name__, error)
        after = None if became is None else became.get(metric)
        better = is_better(after, before, mode)
        taught_by = best if teacher else None
        note = {"steps": steps, "seconds": seconds, "teacher": taught_by, "before": before, "after": after}
        if better:
            store.replace_weights(name, find_family(pl_module), metrics=became, recovery=note | {"kept": True})
            best = name if is_better(after, members[best]["metrics"][metric], mode) else best
        else:
            store.update(name, recovery=note | {"kept": False})
        _log.info(
            "Member %s: %d steps%s, %.0f s, %s %.4g → %s%s.",
            *(name, steps, _taught_by(taught_by), seconds, metric, before),
            "unknown" if after is None else f"{after:.4g}",
            "" if better else ", not kept",
        )


def _train(trainer: Any, pl_module: Any, teacher: nn.Module | None, steps: int, folder: Path) -> None:
    callbacks = [*controllers_like(trainer), *([] if teacher is None else [Distillation(teacher=teacher)])]
    data = trainer.datamodule
    loader = trainer.train_dataloader
    settings = {
        "max_steps": steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        "default_root_dir": folder,
    }
    # Where in its data training is, is in checkpoints that are still to be written.
    holder = data if data is not None else loader
    place = holder.state_dict() if hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict") else None
    pl_module.train()
    try:
        with nested_trainer(trainer, pl_module, callbacks=callbacks, **settings) as nested:
            if data is not None:
                nested.fit(pl_module, datamodule=data)
            else:
                # Not run, but a module that validates is warned about where there are none.
                nested.fit(pl_module, train_dataloaders=loader, val_dataloaders=trainer.val_dataloaders)
    finally:
        if place is not None:
            holder.load_state_dict(place)
        for parameter in pl_module.parameters():
            parameter.grad = None


def describe_recovery(member: dict[str, Any], metric: str) -> tuple[float, float, str]:
    """Returns the metric before and after, and the reason, for the record of decisions."""
    note = member["recovery"]
    after = note["after"] if note["kept"] else note["before"]
    verdict = "kept" if note["kept"] else "thrown away, as it was no better"
    taught = _taught_by(note["teacher"])
    reason = f"{note['steps']} more steps of member {member['name']!r}{taught}{',' if taught else ''} were {verdict}"
    return note["before"], after, f"{reason} ({metric})"


def _taught_by(teacher: str | None) -> str:
    return "" if teacher is None else f", taught by {teacher!r}"
