"""The part that travels: one file per way of using a trained model, torch and diffusers only."""

from .cxr_anomaly import AnomalyOutput
from .pipeline_cfg_anomaly import CFGAnomalyPipeline
from .pipeline_diffpir_deblur import DeblurOutput, DiffPIRDeblurPipeline

__all__ = ["AnomalyOutput", "CFGAnomalyPipeline", "DeblurOutput", "DiffPIRDeblurPipeline"]
