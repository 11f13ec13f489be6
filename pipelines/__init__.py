"""The part that travels: one file per way of using a trained model, torch and diffusers only."""

from .cxr_anomaly import AnomalyOutput
from .pipeline_cfg_anomaly import CFGAnomalyPipeline
from .pipeline_classifier_guided import ClassifierGuidedPipeline
from .pipeline_diffpir_deblur import DeblurOutput, DiffPIRDeblurPipeline
from .pipeline_fixed_point_gan import FixedPointGANPipeline
from .pipeline_grad_cam import GradCAMPipeline
from .pipeline_pyramid_cam import PyramidCAMPipeline

__all__ = [
    "AnomalyOutput",
    "CFGAnomalyPipeline",
    "ClassifierGuidedPipeline",
    "DeblurOutput",
    "DiffPIRDeblurPipeline",
    "FixedPointGANPipeline",
    "GradCAMPipeline",
    "PyramidCAMPipeline",
]
