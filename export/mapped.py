"""Weights that are mapped from a file, and the memory that reading them has filled."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import nn

PAGEOUT = 21  # MADV_PAGEOUT of Linux, which Python's mmap does not name


def let_go(module: nn.Module) -> None:
    """Tell the system that the weights of `module` are not needed for now: pages of a mapped file leave memory, and are read
    again when they are needed; and so does what was freed already. It changes no number, and on other systems than Linux it
    does nothing."""
    if sys.platform != "linux":
        return
    system = ctypes.CDLL(None)
    for tensor in module.state_dict().values():
        begin, size = tensor.data_ptr(), tensor.nbytes if tensor.is_contiguous() else 0
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            system.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), PAGEOUT)
    if hasattr(system, "malloc_trim"):  # of glibc
        system.malloc_trim(0)
