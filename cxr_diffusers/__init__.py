"""See where a chest X-ray is abnormal, from image-level labels alone: the table of contents."""

import importlib
import os
from pathlib import Path

from .version import __version__

# `pipelines/` lies beside this folder in a checkout, inside it when installed; its name is the same either way.
if not Path(__file__).with_name("pipelines").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

# where onnxruntime is installed diffusers imports it, and its official builds report to Microsoft unless this is set
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# name -> module; imported on first use, since torch and diffusers take seconds to import
_HOME = {
    "AnomalyOutput": "pipelines",
    "CFGAnomalyPipeline": "pipelines",
    "ClassifierGuidedPipeline": "pipelines",
    "ClassMatrixUNet": "models.class_matrix_unet",
    "ExportedNet": "models.exported_net",
    "FixedPointDiscriminator": "models.fixed_point_gan",
    "FixedPointGANPipeline": "pipelines",
    "FixedPointGenerator": "models.fixed_point_gan",
    "GradCAMPipeline": "pipelines",
    "LungSegmenter": "models.lung_segmenter",
    "NoisyClassifier": "models.noisy_classifier",
    "SpaceToDepthUNet": "models.space_to_depth_unet",
    "PyramidCAMPipeline": "pipelines",
    "PyramidClassifier": "models.pyramid_classifier",
    "DeblurOutput": "pipelines",
    "DiffPIRDeblurPipeline": "pipelines",
    "build_dataset": "data",
    "load_brats": "data",
    "load_chestx_det": "data",
    "load_chexlocalize": "data",
    "load_chexmask": "data",
    "load_chexpert": "data",
    "load_folder": "data",
    "load_hub": "data",
    "load_mimic_cxr": "data",
    "load_nih": "data",
    "load_packed": "data",
    "load_padchest": "data",
    "load_phantom": "data",
    "load_rsna": "data",
    "load_siim": "data",
    "load_table": "data",
    "load_vindr": "data",
    "load_vindr_pcxr": "data",
    "read_image": "data",
    "convert_checkpoint": "guided_diffusion",
    "default_checkpoint": "hub.loading",
    "compare": "evaluation",
    "deblur": "deblurring.dataset",
    "denoising_loss": "training.losses",
    "estimate_kernel": "deblurring.kernel_estimation",
    "detect": "inference.detection",
    "evaluate": "evaluation",
    "export_pipeline": "inference.export",
    "evaluate_chexlocalize": "evaluation",
    "load_pipeline": "hub.loading",
    "load_prior": "deblurring.dataset",
    "load_recipe": "training.recipe",
    "make_kernel": "deblurring.degradations",
    "prepare": "data",
    "publish": "hub.publishing",
    "publish_dataset": "hub.datasets",
    "run_as_original": "guided_diffusion.original",
    "train": "training.loop",
    "train_adversarial": "training.adversarial_loop",
    "with_backend": "inference.export",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted(__all__)
