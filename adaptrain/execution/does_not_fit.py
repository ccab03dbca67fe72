"""The error for what cannot be made to fit into memory, and what it says."""

from __future__ import annotations

from adaptrain.execution.split import BatchLayout


class DoesNotFitError(RuntimeError):
    """A single sample, or a batch that cannot be split, does not fit into the memory there is."""


def does_not_fit(
    layout: BatchLayout | None, can_split: bool, report: str, message: str | None, *, stage: str | None = None
) -> str:
    """Returns the text of a `DoesNotFitError`.

    Args:
        layout: The layout of what did not fit, where there is one.
        can_split: Whether it was a single sample; else it is a batch that cannot be split.
        report: A description of memory.
        message: The error's first line; None where another rank ran out.
        stage: The stage of evaluation; None in training.
    """
    what = "A single sample" if can_split else "A batch that cannot be split into samples"
    length = f" ({layout.length} columns)" if layout is not None and layout.length > 1 else ""
    training = " gradient checkpointing, an optimizer with less state," if stage is None else ""
    return (
        f"{what}{length} does not fit into memory{'' if stage is None else f' in {stage}'}. {report} The error was:"
        f" {message or 'on another rank'}\nWhat to try: shorter sequences or smaller inputs, a lower precision,"
        f"{training} a smaller model, or a higher memory_limit_gib where that is what limits."
    )
