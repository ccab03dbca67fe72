"""Reducing gradients while the last backward of a step runs: where it may be done, and what if it fails."""

from __future__ import annotations

from collections.abc import Iterable

from adaptrain.execution.split import Piece


class LastBackwardError(RuntimeError):
    """Memory ran out on this rank while the ranks were reducing gradients: they cannot take the step back together."""

    def __init__(self, report: str, message: str) -> None:
        super().__init__(
            "Memory ran out in the last backward of a step, while gradients were reduced over the ranks (overlap=True)."
            f" The others wait for this rank, so that the step cannot run again. {report} The error was: {message}\n"
            "What to try: overlap=False, which survives this; or a smaller micro_batch_size or memory_fraction."
        )


class ProvenSizes:
    """Which micro-batches have been through backward, so that another one as small can be expected to fit.

    The optimizer's state comes with its first update: what fitted before that proves nothing.
    """

    def __init__(self) -> None:
        self._largest: set[tuple[int, int]] = set()
        self._has_stepped = False

    def covers(self, piece: Piece) -> bool:
        """Whether one of at least as many samples and columns has fitted."""
        return any(size >= piece.size and length >= piece.length for size, length in self._largest)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Takes in the micro-batches of a step that succeeded."""
        if not self._has_stepped:
            return
        for piece in pieces:
            if not self.covers(piece):
                larger = {(s, n) for s, n in self._largest if s > piece.size or n > piece.length}
                self._largest = larger | {(piece.size, piece.length)}

    def clear(self) -> None:
        """Forgets them: memory has become less."""
        self._largest = set()

    def restart(self) -> None:
        """Hears that steps take more from here on, and that there is more for the optimizer to keep state of."""
        self.clear()
        self._has_stepped = False

    def stepped(self) -> None:
        """Hears that an accumulation window ended: the optimizer steps next."""
        self._has_stepped = True
