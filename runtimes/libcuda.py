"""CUDA's driver through ctypes, for what llama.cpp leaves as it is: memory that every context sets aside, whatever runs in it.

    shrink_context(0)        # before llama.cpp touches the GPU

For each thread that the card could have in flight a context reserves a stack of 1 kB: 277 MB of the 552 MB that an empty context takes
on an H100. llama.cpp's kernels hardly need one, and the driver enlarges it for a kernel that does: 264 MB are saved under a model.
cuBLAS takes 32 MiB of workspace for each of the two graphs' handles on such a card; with small ones the tower is as fast
(docs/LOG.md, 2026-11-22, for both).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

_LIMIT_STACK_SIZE = 0  # CU_LIMIT_STACK_SIZE
_WORKSPACE = ":16:8"  # eight of 16 KiB: cuBLAS's documentation, "cublasSetWorkspace"


def shrink_context(device: int) -> bool:
    """Make the context of CUDA's device number `device` small; whether that went well. Without a driver: False.

    Leaves a CUBLAS_WORKSPACE_CONFIG that is set already.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)
    try:
        driver: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    steps: tuple[Callable[[], int], ...] = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(handle), device),
        # Kept for the process's life: llama.cpp's runtime takes the same primary context.
        lambda: driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle),
        lambda: driver.cuCtxSetCurrent(context),
        lambda: driver.cuCtxSetLimit(_LIMIT_STACK_SIZE, ctypes.c_size_t(0)),
    )
    return all(step() == 0 for step in steps)
