"""Watches the resources from a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

from adaptrain import _lightning
from adaptrain.callbacks.base import AdaptiveCallback
from adaptrain.errors import ConfigurationError
from adaptrain.resources import ResourceProbe, ResourceSnapshot
from adaptrain.resources.host import PeakMemory

_LOG = logging.getLogger(__name__)
_JOIN_S = 10.0  # a driver that hangs must not keep the process


class ResourceMonitor(AdaptiveCallback):
    """Samples memory, processor and GPUs while the model trains, logs them and keeps the peaks.

    A daemon thread takes the samples; the hooks only hand the latest one to the trainer's loggers, under
    `adaptrain/`, at Lightning's own cadence (`log_every_n_steps`) and from rank zero. It changes nothing in training
    and takes no decisions, so `dry_run` makes no difference. A probe that fails costs its sample and one warning.

    Args:
        interval_s: Seconds between two samples, greater than 0.
        dry_run: As in every adaptive callback; without effect here.
        name: Tells two instances apart in a checkpoint; None where there is one.

    Raises:
        ConfigurationError: `interval_s` is not a number greater than 0.
    """

    def __init__(self, *, interval_s: float = 1.0, dry_run: bool = False, name: str | None = None) -> None:
        super().__init__(dry_run=dry_run, name=name)
        numeric = isinstance(interval_s, (int, float)) and not isinstance(interval_s, bool)
        if not (numeric and math.isfinite(interval_s) and interval_s > 0):
            raise ConfigurationError(
                f"ResourceMonitor(interval_s={interval_s!r}): seconds between two samples, a number greater than 0."
                " The default is 1.0."
            )
        self.interval_s = interval_s
        self._peaks: dict[str, float] = {}
        self._sampler: _Sampler | None = None
        self._logged: dict[str, float] | None = None

    @property
    def latest(self) -> ResourceSnapshot | None:
        """The latest sample; None before the first and after fit."""
        return None if self._sampler is None else self._sampler.latest

    def peaks(self) -> dict[str, float]:
        """Returns the peaks of this rank since the run began, resumed runs counted in; still there after fit.

        Returns:
            `host_rss_gib`, the process's resident memory: exact where the kernel keeps the peak (Linux), else the
            largest sample. With CUDA also the most that tensors held, `device_allocated_gib`, and the allocator,
            `device_reserved_gib`, on the fullest device. Empty before the first sample.
        """
        if self._sampler is not None:
            _raise_to(self._peaks, self._sampler.peaks)
        return dict(self._peaks)

    def state_dict(self) -> dict[str, Any]:
        """Returns the peaks so far."""
        return {"peaks": self.peaks()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the peaks of the run that is resumed."""
        _raise_to(self._peaks, state_dict["peaks"])

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forgets the peaks of an earlier fit; those of a resumed run are loaded after this."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._peaks = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts sampling."""
        super().on_fit_start(trainer, pl_module)
        self._logged = None
        self._sampler = _Sampler(self.interval_s)
        self.on_exit(self._stop)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the latest sample, unless it was logged before."""
        every = trainer.log_every_n_steps
        if not every or trainer.global_step % every or not trainer.loggers or not _lightning.is_rank_zero(trainer):
            return
        metrics = None if self._sampler is None else self._sampler.metrics
        if metrics is None or metrics is self._logged:
            return
        self._logged = metrics
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _stop(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()
            self.peaks()
            self._sampler = None


class _Sampler:
    """The thread. What it offers is replaced as a whole, so the hooks read it without a lock."""

    def __init__(self, interval_s: float) -> None:
        self.latest: ResourceSnapshot | None = None
        self.metrics: dict[str, float] | None = None
        self.peaks: dict[str, float] = {}
        self._interval_s = interval_s
        self._warned = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adaptrain-resource-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Takes a last sample and ends the thread."""
        self._ended.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        probe = ResourceProbe()
        peak = PeakMemory(interval_s=self._interval_s)
        with contextlib.ExitStack() as stack:
            stack.callback(self._survive, probe.close)
            stack.callback(self._survive, peak.close)
            self._survive(peak.reset)
            while True:
                self._survive(lambda: self._sample(probe, peak))
                if self._ended.is_set():
                    return
                self._ended.wait(self._interval_s)

    def _sample(self, probe: ResourceProbe, peak: PeakMemory) -> None:
        sample = probe.read()
        peaks = dict(self.peaks)
        _raise_to(peaks, {"host_rss_gib": max(sample.rss_gib, peak.read() / 2**30)})
        for device in sample.devices:
            if device.allocated_gib is not None:
                tensors = max(device.allocated_gib, device.peak_allocated_gib or 0.0)
                _raise_to(peaks, {"device_allocated_gib": tensors, "device_reserved_gib": device.reserved_gib or 0.0})
        self.peaks = peaks
        self.metrics = {f"adaptrain/{name}": value for name, value in sample.metrics().items()}
        self.latest = sample

    def _survive(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # a reading is never worth a training run
            if not self._warned:
                self._warned = True
                _LOG.warning("A resource sample failed and is missing; training goes on: %r", error)


def _raise_to(peaks: dict[str, float], values: dict[str, float]) -> None:
    for name, value in values.items():
        peaks[name] = max(value, peaks.get(name, 0.0))
