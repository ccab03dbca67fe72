"""Probes: what the host and the GPUs have, read into plain values."""

from adaptrain.resources.snapshot import DeviceReading, ResourceProbe, ResourceSnapshot, snapshot

__all__ = ["DeviceReading", "ResourceProbe", "ResourceSnapshot", "snapshot"]
