"""guided-diffusion checkpoints (OpenAI's, Wolleb's, the CFG fork's) as diffusers folders."""

import importlib

# imported on first use: the help of the command line needs the flags, but not torch
_HOME = {
    "ConversionFlags": "flags",
    "convert_checkpoint": "checkpoint",
    "convert_state_dict": "unet",
    "parse_flag": "flags",
    "read_checkpoint": "checkpoint",
}

__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
