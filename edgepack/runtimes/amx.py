"""Keep llama.cpp off Intel's AMX tiles, whose code path there crashes.

llama.cpp moves quantized weights into an AMX buffer on every CPU that has the tiles (Sapphire Rapids and later). GCC 12
compiles the tile configuration away, and the first product ends in a general protection fault; other reports stand open
(llama.cpp #20824 and #26954, ollama #17249). No edge device has AMX, so nothing is lost by running what devices run:
the AVX-512/AVX2 kernels with repacked weights.

How: ggml uses AMX only when the kernel grants tile state (ggml-cpu/amx/amx.cpp, `ggml_amx_init`); it asks when it first
loads a model. The kernel refuses with ENOSPC while a thread has a signal stack too small for that state (Linux
Documentation/arch/x86/xstate.rst), so a small one is registered for that moment. A process that was granted tiles
earlier (by torch) keeps them: `granted` says so, and the caller then turns weight repacking off.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_ARCH_PRCTL = 158  # x86-64 system call number, arch/x86/entry/syscalls/syscall_64.tbl
_ARCH_GET_XCOMP_PERM = 0x1022  # arch/x86/include/uapi/asm/prctl.h
_XTILEDATA = 18  # XSAVE component number of the tile data, Intel SDM volume 1, 13.1
_SMALL_STACK = 4096  # accepted by sigaltstack (at least MINSIGSTKSZ, 2048), too small for 8 KiB of tiles


class _SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_ = [("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t)]


def _linux_x86() -> bool:
    return platform.system() == "Linux" and platform.machine() == "x86_64"


def granted() -> bool:
    """True when this process may use AMX tiles already; it can't be taken back."""
    if not _linux_x86():
        return False
    mask = ctypes.c_uint64(0)
    status = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_GET_XCOMP_PERM, ctypes.byref(mask))
    return status == 0 and bool(mask.value >> _XTILEDATA & 1)


@contextmanager
def refused() -> Iterator[None]:
    """While inside, the kernel grants no AMX tiles to this process; on other machines this does nothing."""
    if not _linux_x86():
        yield
        return
    libc = ctypes.CDLL(None)
    memory = ctypes.create_string_buffer(_SMALL_STACK)
    small, before = _SignalStack(ctypes.addressof(memory), 0, _SMALL_STACK), _SignalStack()
    libc.sigaltstack(ctypes.byref(small), ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
