"""The frozen model that teaches another: a copy of it, or one that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adaptrain.errors import ConfigurationError
from adaptrain.pruning import cost
from adaptrain.pruning import structure as structures
from adaptrain.pruning.family import Match
from adaptrain.pruning.surgery import resize


def copy_teacher(match: Match) -> nn.Module:
    """Returns a frozen copy of the model as it is now, without its hooks and gradients."""
    return restore_teacher(match, teacher_state(match, match.model))


def teacher_state(match: Match, teacher: nn.Module) -> dict[str, Any]:
    """Returns what `restore_teacher` needs: structure and weights, loadable with `weights_only=True`.

    Args:
        match: The student.
        teacher: Its teacher, of the same architecture.
    """
    return {"structure": structures.record(Match(teacher, match.family)), "weights": teacher.state_dict()}


def restore_teacher(match: Match, state: Mapping[str, Any]) -> nn.Module:
    """Returns the frozen model that `teacher_state` described, on the student's device and in its dtype."""
    teacher = Match(match.dense_twin(), match.family)
    structures.check_record(teacher, state["structure"])
    if state["structure"]["layers"] != structures.current(teacher):
        resize(teacher, structures.copy_of(state["structure"]["layers"]))
    teacher.model.load_state_dict(state["weights"])
    return frozen(teacher.model)


def load_teacher(name_or_path: str) -> nn.Module:
    """Returns a saved Hugging Face model, frozen.

    Args:
        name_or_path: A folder, or a name of the hub.

    Raises:
        ConfigurationError: There is none, or it is not of a class with a head.
    """
    try:
        import transformers

        config: Any = transformers.AutoConfig.from_pretrained(name_or_path)
        kind = getattr(transformers, (config.architectures or ["none"])[0], None)
        model = kind.from_pretrained(name_or_path) if kind is not None else None
    except Exception as error:  # transformers, the hub's client and the network each raise their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigurationError(
            f"The teacher {name_or_path!r} cannot be loaded: {first}. Give teacher='dense', or a folder (or a name of"
            " the Hugging Face hub) with config.json and the weights of a model trained for the task."
        ) from error
    if model is None:
        raise ConfigurationError(
            f"The teacher {name_or_path!r} does not say of which class it is (architectures in config.json). Save it"
            " with save_pretrained."
        )
    return frozen(model)


@torch.no_grad()
def check_teacher(teacher: nn.Module, match: Match, *, hidden: bool) -> None:
    """Refuses a teacher that does not speak the student's language, by a forward pass of both over a few tokens.

    Args:
        teacher: The teacher.
        match: The student.
        hidden: Whether hidden states are compared as well.

    Raises:
        ConfigurationError: Vocabulary, logits or hidden width differ; it says how.
    """
    sizes = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (teacher, match.model)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ConfigurationError(
            f"The teacher has a vocabulary of {sizes[0]} tokens, the student of {sizes[1]}: they must read the same."
        )
    inputs = match.example_inputs(1, 4)
    shapes = []
    for model in (teacher, match.model):
        with cost.evaluating(model):
            output = model.to(inputs["input_ids"].device)(**inputs) if model is teacher else model(**inputs)
        logits = getattr(output, "logits", None)
        if logits is None:
            raise ConfigurationError(
                f"Distillation needs logits, but {type(model).__name__} returns none. The teacher and the student must"
                " be trained for the same task, as models with a head."
            )
        shapes.append(tuple(logits.shape[1:]))
    if shapes[0] != shapes[1]:
        raise ConfigurationError(
            f"The teacher's logits are of shape {shapes[0]} for each sample, the student's {shapes[1]}. They must have"
            " the same classes, or the same vocabulary."
        )
    widths = [getattr(getattr(model, "config", None), "hidden_size", None) for model in (teacher, match.model)]
    if hidden and widths[0] != widths[1]:
        raise ConfigurationError(
            f"hidden=True compares hidden states, but the teacher's are {widths[0]} wide and the student's {widths[1]}."
            " Set hidden=False."
        )


def frozen(model: nn.Module) -> nn.Module:
    """Returns the model in evaluation mode, with no parameter that requires a gradient."""
    return model.eval().requires_grad_(False)
