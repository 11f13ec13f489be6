"""Where bfloat16 is fast."""

from functools import cache
from pathlib import Path

import torch


@cache
def cpu_has_bfloat16():
    """Whether this CPU multiplies bfloat16 in hardware (AVX512_BF16, AMX, or Arm's BF16): elsewhere it is emulated."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def has_fast_bfloat16(device):
    """Whether bfloat16 is faster than float32 on a device, and not slower by a factor of a hundred."""
    kind = torch.device(device).type
    if kind == "cpu":
        return cpu_has_bfloat16()
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
