"""What the CPU is fast at, told without torch: decisions before the start and in the worker have to agree."""

from __future__ import annotations

from functools import cache
from pathlib import Path

# Names of Linux (arch/x86/include/asm/cpufeatures.h) for instructions that multiply bfloat16 numbers.
_PRODUCTS = {"avx512_bf16", "amx_bf16"}


@cache
def fast_bfloat16() -> bool:
    """True where products in bfloat16 take less time than in float32: x86 with AVX512-BF16 or AMX, on Linux."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return False
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return bool(_PRODUCTS & set(line.split()))
    return False
