"""The checkpoints of a run, and the finished model beside them: whole or not there."""

import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def checkpoints(output_dir):
    """The finished checkpoint folders of a run, oldest first."""
    return sorted(p for p in Path(output_dir).glob("checkpoint-*") if p.suffix != ".tmp")


def checkpoint(accelerator, ema, output_dir, step, limit, seconds=0.0):
    """Write `checkpoint-STEP` under a temporary name, rename it when it is whole, then drop the oldest over `limit`."""
    final = Path(output_dir) / f"checkpoint-{step:07d}"
    temporary = final.with_suffix(".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        averages = {str(i): p.contiguous() for i, p in enumerate(ema.shadow_params)}
        metadata = {"optimization_step": str(ema.optimization_step), "seconds": str(seconds)}
        save_file(averages, temporary / "ema.safetensors", metadata=metadata)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        for old in checkpoints(output_dir)[:-limit] if limit else ():
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator, ema, output_dir):
    """Load the newest checkpoint, if there is one; (steps, seconds) of training already done."""
    found = checkpoints(output_dir)
    if not found:
        return 0, 0.0
    accelerator.load_state(str(found[-1]))
    averages = load_file(found[-1] / "ema.safetensors")
    for i, parameter in enumerate(ema.shadow_params):
        parameter.copy_(averages[str(i)])
    step = int(found[-1].name.split("-")[1])
    ema.optimization_step = step
    with safe_open(found[-1] / "ema.safetensors", "pt") as file:
        seconds = float((file.metadata() or {}).get("seconds", 0.0))
    return step, seconds


def replace_into(folder, write):
    """`write(temporary)`, then move what it wrote into `folder`, `model_index.json` last: no half-written model."""
    temporary = Path(folder) / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    for item in sorted(temporary.iterdir(), key=lambda p: p.name == "model_index.json"):
        target = Path(folder) / item.name
        if item.is_dir() and target.exists():
            shutil.rmtree(target)
        os.replace(item, target)
    temporary.rmdir()
