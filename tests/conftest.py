"""Toy size, real classes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on the internet
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from diffusers import DDIMScheduler

from cxr_diffusers import CFGAnomalyPipeline
from helpers import toy_unet


@pytest.fixture
def unet():
    return toy_unet()


@pytest.fixture
def scheduler():
    return DDIMScheduler(clip_sample=False)


@pytest.fixture
def pipeline(unet, scheduler):
    pipeline = CFGAnomalyPipeline(unet, scheduler, ["healthy", "pleural effusion"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def images():
    """(2, 1, 16, 16) in [0, 1], each using the whole range."""
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
    return (x - low) / (high - low)
