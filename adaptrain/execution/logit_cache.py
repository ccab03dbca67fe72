"""What a frozen model said of each sample, kept so that it need not be asked twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_ENTRY_BYTES = 200  # of a key, a small tensor and their place in a dict


class LogitCache:
    """Remembers the logits of samples by their content: token ids and whatever else comes with them, without padding.

    A sample that is shuffled into another batch, padded to another length or split into another micro-batch is the
    same one. It serves models with one row of logits for each sample; those of a language model, a vocabulary for each
    token, are computed anew: they are large, and its samples seldom come again.

    Args:
        limit_bytes: Of host memory. Once it is full, samples that are not in it are computed each time.
    """

    def __init__(self, limit_bytes: float) -> None:
        self.limit_bytes = limit_bytes
        self._rows: dict[bytes, Tensor] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def ask(
        self, model: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None
    ) -> Tensor:
        """Returns the logits of a batch; the model sees the samples that are not known yet, together.

        Args:
            model: Returns logits. Called with the arguments, or with some of their rows.
            args: What it is given by position.
            kwargs: What it is given by name.
            mask: Of shape (samples, tokens): 0 where tokens are padding. None: there is none.

        Returns:
            Logits as the model returns them.
        """
        given = [*args, *kwargs.values()]
        tensors = [value for value in given if isinstance(value, Tensor)]
        plain = all(value is None or isinstance(value, (Tensor, bool, int, float, str)) for value in given)
        samples = {len(tensor) if tensor.ndim else -1 for tensor in tensors}
        if not plain or len(samples) != 1 or -1 in samples:
            return model(*args, **kwargs)
        settings = repr([value for value in given if not isinstance(value, Tensor)])
        keys = list(_keys(tensors, mask, settings))
        new = [row for row, key in enumerate(keys) if key not in self._rows]
        fresh: Tensor | None = None
        if new:
            named = dict(zip(kwargs, _rows(kwargs.values(), new, len(keys)), strict=True))
            fresh = model(*_rows(args, new, len(keys)), **named)
            if fresh.ndim != 2:  # not one row a sample: nothing is ever kept, so all of them were new
                return fresh
            for row, logits in zip(new, fresh.detach().cpu(), strict=True):
                self._keep(keys[row], logits.clone())
            if len(new) == len(keys):
                return fresh
        known = {row: self._rows[key] for row, key in enumerate(keys) if row not in set(new)}
        example = next(iter(known.values())) if fresh is None else fresh[0]
        logits = example.new_empty((len(keys), *example.shape), device=tensors[0].device)
        logits[list(known)] = torch.stack(list(known.values())).to(logits)
        if fresh is not None:
            logits[new] = fresh
        return logits

    def state_dict(self) -> dict[str, Any]:
        """Returns what is remembered, so that a resumed run is told the same; loads with `weights_only=True`."""
        return {"keys": list(self._rows), "logits": torch.stack(list(self._rows.values())) if self._rows else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what an earlier run remembered."""
        self._rows, self._bytes = {}, 0
        if state["keys"]:
            for key, logits in zip(state["keys"], state["logits"], strict=True):
                self._keep(key, logits.clone())

    def _keep(self, key: bytes, logits: Tensor) -> None:
        size = logits.numel() * logits.element_size() + _ENTRY_BYTES
        if key not in self._rows and self._bytes + size <= self.limit_bytes:
            self._rows[key] = logits
            self._bytes += size


def _keys(tensors: list[Tensor], mask: Tensor | None, settings: str) -> Iterator[bytes]:
    """Yields a digest of each sample."""
    on_host = [tensor.detach().cpu() for tensor in tensors]
    real = None if mask is None else mask.detach().cpu() != 0
    for row in range(len(on_host[0])):
        digest = hashlib.blake2b(settings.encode(), digest_size=16)
        for tensor in on_host:
            values = tensor[row]
            if real is not None and tensor.shape[: real.ndim] == real.shape:
                values = values[real[row]]
            digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
            digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        yield digest.digest()


def _rows(values: Iterable[Any], rows: list[int], count: int) -> list[Any]:
    if len(rows) == count:
        return list(values)
    return [value[rows] if isinstance(value, Tensor) else value for value in values]
