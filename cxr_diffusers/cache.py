"""Where things are kept that would take long to make again."""

import os
from pathlib import Path


def cache_folder(name):
    """`name` in $CXR_DIFFUSERS_CACHE, else in $XDG_CACHE_HOME/cxr_diffusers, else in ~/.cache/cxr_diffusers."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CXR_DIFFUSERS_CACHE") or Path(home, "cxr_diffusers")) / name
