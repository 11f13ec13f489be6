"""The number format in which networks compute, and where bfloat16 is fast."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from diffusers import DiffusionPipeline, ModelMixin

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512_BF16, AMX, or Arm's BF16): elsewhere it is emulated."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 is faster than float32 on a device, rather than up to a hundred times slower."""
    device_type = torch.device(device).type
    if device_type == "cpu":
        return cpu_has_bfloat16()
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def use_dtype(pipeline: DiffusionPipeline, dtype: str = "auto") -> DiffusionPipeline:
    """Let the networks of a pipeline, where it is placed now, compute in `dtype`: their forward pass under autocast.

    The values of the weights, their fingerprint and the files of `save_pretrained` are unchanged; outputs are float32.
    On a CPU, weights lie in the order `torch.channels_last`; on a GPU, group norm is slow in it (a forward pass on an
    H200 took 1.5 times as long). Command line, page and Ray call this, and give the same maps.
    Classifiers of transformers stay in float32: Grad-CAM differentiates by their feature maps, which a conversion of
    the output would copy.

    Args:
        dtype: "float32", "bfloat16", "float16" (CUDA only), or "auto": bfloat16 where the device multiplies it in
            hardware, else float32.

    Raises:
        ValueError: an unknown `dtype`, or float16 on another device than CUDA.
    """
    device = torch.device(pipeline.device)
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(device) else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"expected `dtype` among auto, {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "float16" and device.type != "cuda":
        raise ValueError(f"expected a CUDA device for float16, got {device}: bfloat16 works on CPUs")
    for component in pipeline.components.values():
        if isinstance(component, ModelMixin):
            plain = vars(component).setdefault("_plain_forward", component.forward)  # not that of an earlier call
            component.forward = plain
            if dtype != "float32":
                component._autocast = (device.type, DTYPES[dtype])
                # `deepcopy` and pickle bind it to the copy
                component.forward = partial(forward_under_autocast, component)
        if isinstance(component, torch.nn.Module) and device.type == "cpu":
            component.to(memory_format=torch.channels_last)  # convolutions take three quarters of the time
    return pipeline


def forward_under_autocast(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward pass that `use_dtype` gives a network; outputs in float32."""
    device_type, dtype = module._autocast
    with torch.autocast(device_type, dtype):
        return convert_to_fp32(module._plain_forward(*args, **kwargs))
