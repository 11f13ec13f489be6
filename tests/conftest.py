"""Toy size, real classes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on the internet
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest

# nothing heavy is imported here: of several processes, the one that shares out the tests runs none
# the files with the longest tests: first, so that no process is left with one at the end
LONGEST = """
demo_browser notebooks training_scripts kill_commands contract hub_data house hub benchmarks two_processes docs
prepare_faults kill_training export training_loop shipped goldens
""".split()


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def unet():
    from helpers import toy_unet

    return toy_unet()


@pytest.fixture
def scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False)


@pytest.fixture
def pipeline(unet, scheduler):
    from cxr_diffusers import CFGAnomalyPipeline

    pipeline = CFGAnomalyPipeline(unet, scheduler, ["healthy", "pleural effusion"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def images():
    """(2, 1, 16, 16) in [0, 1], each using the whole range."""
    import torch

    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
    return (x - low) / (high - low)
