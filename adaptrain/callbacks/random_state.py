"""Random state in the checkpoint, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from adaptrain import _lightning


class RandomState(_lightning.Callback):
    """Keeps the random states of Python, NumPy, torch and CUDA in the checkpoint and restores them on resume.

    Lightning does not: a run resumed with dropout, shuffling or any other use of these generators would draw other
    numbers than the run that was never killed. Each rank gets its own state back. In the middle of an epoch the loader
    must be resumable too (`state_dict` / `load_state_dict`), else the samples are not those that come next.

    On a resume with more ranks than the checkpoint was written by, the added ranks keep their seeds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded: list[dict[str, Any]] | None = None
        self._undo: Callable[[], None] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all ranks. A collective: Lightning calls it on every rank when it saves."""
        return {"ranks": _lightning.all_gather(capture_random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training begins: what Lightning does in between draws random numbers too."""
        self._loaded = state_dict["ranks"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forgets a state that was loaded for a validation or test run: that is nothing to resume from."""
        self._loaded = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Prepares to restore the state before the first batch is fetched."""

        def restore() -> bool:
            if self._loaded is None or trainer.global_rank >= len(self._loaded):
                return False
            restore_random_state(self._loaded[trainer.global_rank])
            return True

        def capture() -> Callable[[], None]:
            state = capture_random_state()
            return lambda: restore_random_state(state)

        self._undo = _lightning.replay_random_state(trainer, restore=restore, capture=capture)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Lets the random numbers run from here on."""
        self._loaded = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves the trainer as it was found."""
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leaves the trainer as it was found: Lightning calls no `teardown` after an exception."""
        self._leave()

    def _leave(self) -> None:
        self._loaded = None
        if self._undo is not None:
            self._undo()
            self._undo = None


def capture_random_state() -> dict[str, Any]:
    """Returns the random states of this process as plain Python.

    CUDA's is that of the current device, and only where the program has initialised CUDA.
    """
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = numpy_state
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _to_hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _to_hex(torch.cuda.get_rng_state())
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets what `capture_random_state` returned; a CUDA state is left out where there is no CUDA."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _to_hex(tensor: torch.Tensor) -> str:
    return bytes(tensor.numpy()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
