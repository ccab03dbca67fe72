"""oneDNN's primitive cache: the kernels that it keeps on a CPU, one for each operation at each shape."""

from __future__ import annotations

import os

__all__ = ["FEW_PRIMITIVES", "limit_primitive_cache"]

FEW_PRIMITIVES = 64
"""Kernels to keep where shapes hardly come back: enough for the layers of one model at one shape."""

_CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_SET_BY_USER = (_CAPACITY, "DNNL_PRIMITIVE_CACHE_CAPACITY")


def limit_primitive_cache(most: int = FEW_PRIMITIVES) -> None:
    """Lets oneDNN keep fewer kernels than the 1024 it keeps by itself, unless the environment says how many.

    On a CPU torch computes GELU with oneDNN, also in full precision. It builds a kernel for every shape it meets (0.4
    ms) and keeps it, in some 60 small blocks of the C library's heap. These come to lie between what steps allocate and
    free: where lengths vary and layers differ in width, they leave the heap in pieces, of which each step uses others.

    oneDNN reads this when it builds the first kernel of the process. It holds for the process, and for those it starts.

    Source: oneDNN Developer Guide, "Primitive Cache",
    https://oneapi-src.github.io/oneDNN/dev_guide_primitive_cache.html

    Args:
        most: Kernels that are kept; 0 keeps none.
    """
    if not any(name in os.environ for name in _SET_BY_USER):
        os.environ[_CAPACITY] = str(most)
