"""Toy size, real classes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on the internet
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from transformers import ResNetConfig, ResNetForImageClassification

from cxr_diffusers import CFGAnomalyPipeline, FixedPointGenerator, NoisyClassifier, PyramidClassifier

torch.set_num_threads(1)

TOY_UNET = dict(
    sample_size=16,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    norm_num_groups=4,
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
    num_class_embeds=3,
)


def toy_unet(seed=0, **changes):
    """The real class, 16 x 16, a few thousand weights; every layer random, also those that start at zero."""
    torch.manual_seed(seed)
    unet = UNet2DModel(**{**TOY_UNET, **changes})
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.7 / parameter[0].numel() ** 0.5)
    return unet.eval()


TOY_CLASSIFIER = dict(
    sample_size=16,
    block_out_channels=(8, 16),
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    norm_num_groups=4,
    attention_head_dim=8,
)


def toy_classifier(seed=0, **changes):
    """The real class, 16 x 16, a few thousand weights."""
    torch.manual_seed(seed)
    return NoisyClassifier(**{**TOY_CLASSIFIER, **changes}).eval()


def toy_resnet(num_labels=2, **changes):
    torch.manual_seed(0)
    shape = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=1)
    return ResNetForImageClassification(ResNetConfig(**{**shape, **changes}, num_labels=num_labels)).eval()


TOY_GENERATOR = dict(sample_size=16, in_channels=1, num_classes=2, base_channels=4, num_res_blocks=1)


def toy_generator(seed=0, **changes):
    torch.manual_seed(seed)
    return FixedPointGenerator(**{**TOY_GENERATOR, **changes}).eval()


TOY_PYRAMID = dict(
    sample_size=16, block_out_channels=(8, 8, 16), layers_per_block=1, decoder_channels=8, norm_num_groups=4
)


def toy_pyramid(num_classes=2, seed=0, **changes):
    """The real class, 16 x 16, a few thousand weights."""
    torch.manual_seed(seed)
    return PyramidClassifier(**{**TOY_PYRAMID, "attention_head_dim": 8, **changes}, num_classes=num_classes).eval()


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
