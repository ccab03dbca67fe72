"""Leaving with a small model: exports that load without adaptrain, and lower precision. Names are imported on use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptrain._lazy import lazily

if TYPE_CHECKING:
    from adaptrain.compression.exporter import Exported as Exported
    from adaptrain.compression.exporter import export as export
    from adaptrain.compression.quantization import Quantized as Quantized
    from adaptrain.compression.quantization import load_quantized as load_quantized
    from adaptrain.compression.quantization import quantize as quantize
    from adaptrain.compression.quantization import save_quantized as save_quantized
    from adaptrain.compression.structured import load as load

_NAMES = {
    "Exported": "adaptrain.compression.exporter",
    "export": "adaptrain.compression.exporter",
    "Quantized": "adaptrain.compression.quantization",
    "load": "adaptrain.compression.structured",
    "load_quantized": "adaptrain.compression.quantization",
    "quantize": "adaptrain.compression.quantization",
    "save_quantized": "adaptrain.compression.quantization",
}

__all__ = list(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazily(__name__, _NAMES)
