"""What a table of timings has to say about where it was taken."""

import os
import platform
from pathlib import Path

import torch


def describe_machine(device="cpu"):
    """One line: processor or GPU, threads, versions, and how busy the machine is already."""
    where = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else processor()
    return (
        f"{where}, {torch.get_num_threads()} of {os.cpu_count()} threads, load before {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(header, rows):
    """A Markdown table; `rows` of strings."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
