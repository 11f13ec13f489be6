"""The part that travels: one file per way of using a trained model, torch and diffusers only."""

from .cxr_anomaly import AnomalyOutput
from .pipeline_cfg_anomaly import CFGAnomalyPipeline
from .pipeline_classifier_guided import ClassifierGuidedPipeline
from .pipeline_grad_cam import GradCAMPipeline

__all__ = ["AnomalyOutput", "CFGAnomalyPipeline", "ClassifierGuidedPipeline", "GradCAMPipeline"]
