"""Opens this folder with the classes of the installed `cxr_diffusers`."""

from cxr_diffusers.pipelines import *  # noqa: F403
