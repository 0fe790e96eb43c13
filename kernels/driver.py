"""Questions to CUDA's driver that PyTorch does not ask."""

from __future__ import annotations

import ctypes

_NOT_INITIALIZED = 3
_COMPUTE_MODE = 20


def began() -> bool:
    """Return whether this process uses the driver already, without beginning to: processes forked from it then can't."""
    driver = _driver()
    return driver is not None and driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED


def shared(index: int) -> bool:
    """Return whether several processes may use a GPU at once. Begins to use the driver."""
    driver, device, mode = _driver(), ctypes.c_int(), ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return False
    return driver.cuDeviceGetAttribute(ctypes.byref(mode), _COMPUTE_MODE, device) == 0 and mode.value == 0


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
