"""Makes the CUDA context while Python still imports torch, which would make it afterwards.

Both take a good part of a second or more. The driver's calls leave Python's lock to the import.
"""

from __future__ import annotations

import ctypes
from threading import Thread

DRIVER = "libcuda.so.1"


def begin_context(device: str, driver: str = DRIVER) -> Thread | None:
    """Make the context that torch will use, in a thread; it is not told of errors, torch is.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        driver: CUDA's library.

    Returns:
        The thread; None where there is no driver, or nothing for it to do.
    """
    if device == "cpu":
        return None
    try:
        library = ctypes.CDLL(driver)
    except OSError:
        return None
    number = int(device.partition(":")[2] or 0)
    thread = Thread(target=_make, args=(library, number), name="cuda-context", daemon=True)
    thread.start()
    return thread


def _make(library: ctypes.CDLL, number: int) -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if not library.cuInit(0) and not library.cuDeviceGet(ctypes.byref(device), number):
        library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
